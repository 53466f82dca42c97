"""The arguments of diffusers' model class, found from a checkpoint's header, and those that no weight shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mesh_core.model import CheckpointHeader
from mesh_core.model.adapting import check_sizes, diffusers_class, full_config
from mesh_ltx.metadata import config_from_metadata

MODEL_CLASS = "LTX2VideoTransformer3DModel"
INVISIBLE = (
    "num_attention_heads",
    "audio_num_attention_heads",
    "activation_fn",
    "norm_eps",
    "patch_size",
    "patch_size_t",
    "audio_patch_size",
    "audio_patch_size_t",
    "vae_scale_factors",
    "pos_embed_max_pos",
    "base_height",
    "base_width",
    "audio_pos_embed_max_pos",
    "audio_scale_factor",
    "audio_sampling_rate",
    "audio_hop_length",
    "causal_offset",
    "rope_type",
    "rope_theta",
    "rope_double_precision",
    "timestep_scale_multiplier",
    "cross_attn_timestep_scale_multiplier",
)


def make_model(config: Mapping[str, Any]) -> nn.Module:
    """The model class with these arguments, on whatever device torch makes tensors on now."""
    return diffusers_class(MODEL_CLASS)(**config)


def config_of(header: CheckpointHeader, prefix: str) -> dict[str, Any]:
    """From ``config.json``, or else from the metadata of a single file whose names begin with ``prefix``.

    Raises:
        CheckpointError: neither says it, or what it says cannot be.
    """
    given = header.config or config_from_metadata(header, prefix)
    config = full_config(diffusers_class(MODEL_CLASS), given)
    heads = ("num_attention_heads", "attention_head_dim", "audio_num_attention_heads")
    check_sizes(header, config, heads, ("num_layers",))
    return config
