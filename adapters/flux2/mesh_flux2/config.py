"""The arguments of diffusers' model class, found from a checkpoint's header."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from mesh_core.errors import CheckpointCorrupt
from mesh_core.model import CheckpointHeader, TensorInfo
from mesh_core.model.adapting import LARGEST_SIZE, check_sizes, diffusers_class, full_config
from mesh_flux2.layout import pieces_of

MODEL_CLASS = "Flux2Transformer2DModel"

INVISIBLE = ("axes_dims_rope", "rope_theta", "eps")
"""Arguments of the model class that show in no parameter's name or shape, see `ModelSpec.invisible`."""

_SIZES = (
    "in_channels",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "timestep_guidance_channels",
)


def make_model(config: Mapping[str, Any]) -> nn.Module:
    """The model class with these arguments, on whatever device torch makes tensors on now."""
    return diffusers_class(MODEL_CLASS)(**config)


def config_of(header: CheckpointHeader) -> dict[str, Any]:
    """From the ``config.json`` of a folder that diffusers saved.

    Raises:
        CheckpointCorrupt: it says what cannot be.
    """
    config = full_config(diffusers_class(MODEL_CLASS), header.config)
    check_sizes(header, config, _SIZES, ("num_layers", "num_single_layers"))
    return config


def config_from_shapes(tensors: Mapping[str, TensorInfo], prefix: str, bfl: bool) -> dict[str, Any]:
    """From the tensors of a single file, whose names `find_layout` told apart.

    Raises:
        CheckpointCorrupt: a tensor is missing, or the shapes do not fit each other.
    """

    def shape(name: str, dimensions: int = 2) -> tuple[int, ...]:
        pieces = pieces_of(name, 0, tensors, prefix, bfl)
        info = tensors.get(pieces[0].tensor)
        if info is None:
            raise CheckpointCorrupt(f"A FLUX.2 transformer without {pieces[0].tensor}.")
        if len(info.shape) != dimensions or not all(0 < size <= LARGEST_SIZE for size in info.shape):
            raise CheckpointCorrupt(f"A FLUX.2 transformer whose {info.name} has the shape {list(info.shape)}.")
        return info.shape

    stacks = ("double_blocks", "single_blocks") if bfl else ("transformer_blocks", "single_transformer_blocks")
    doubles, singles = (_blocks(tensors, prefix, stack) for stack in stacks)
    width, channels = shape("x_embedder.weight")
    block = "transformer_blocks.0.attn.norm_q.weight" if doubles else "single_transformer_blocks.0.attn.norm_q.weight"
    (head,) = shape(block, 1)
    mlp = shape("single_transformer_blocks.0.attn.to_out.weight")[1] - width if singles else None
    mlp = mlp if mlp is not None else shape("transformer_blocks.0.ff.linear_out.weight")[1]
    if width % head or mlp <= 0 or head % 4:
        raise CheckpointCorrupt(
            f"The shapes of this FLUX.2 transformer do not fit each other (width {width}, head {head}, MLP {mlp}).",
        )
    guided = pieces_of("time_guidance_embed.guidance_embedder.linear_1.weight", 0, tensors, prefix, bfl)[0].tensor
    return {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": shape("proj_out.weight")[0],
        "num_layers": doubles,
        "num_single_layers": singles,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shape("context_embedder.weight")[1],
        "timestep_guidance_channels": shape("time_guidance_embed.timestep_embedder.linear_1.weight")[1],
        "mlp_ratio": mlp / width,
        "axes_dims_rope": (head // 4,) * 4,
        "rope_theta": 2000,
        "eps": 1e-6,
        "guidance_embeds": guided in tensors,
    }


def _blocks(tensors: Mapping[str, TensorInfo], prefix: str, stack: str) -> int:
    start = len(prefix) + len(stack) + 1
    indices = {n[start:].partition(".")[0] for n in tensors if n.startswith(f"{prefix}{stack}.")}
    blocks = 1 + max((int(i) for i in indices if re.fullmatch("[0-9]{1,6}", i)), default=-1)
    if blocks > len(indices):
        raise CheckpointCorrupt(f"A FLUX.2 transformer with {len(indices)} of {blocks} {stack}.")
    return blocks
