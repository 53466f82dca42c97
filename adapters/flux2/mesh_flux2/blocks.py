"""FLUX.2's double and single blocks: what exists at the cuts between them, and which of them need a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mesh_core.model import BlockSpan, Dimensions, Role
from mesh_core.model.adapting import scope_in_stacks


def states(doubles: int, singles: int, guidance: bool) -> tuple[Mapping[str, Role], ...]:
    """The tensors at each cut; `Flux2Stage` has their shapes."""
    first: dict[str, Role] = {"hidden_states": "latent", "timestep": "exact"}
    if guidance:
        first["guidance"] = "exact"
    apart: dict[str, Role] = {"hidden_states": "hidden", "encoder_hidden_states": "hidden", "temb": "exact"}
    joined: dict[str, Role] = {"hidden_states": "hidden", "temb": "exact"}
    last: dict[str, Role] = {"sample": "prediction"}
    return (first, *[apart] * max(doubles - 1, 0), *[joined] * (singles if doubles else max(singles - 1, 0)), last)


def shapes(config: Mapping[str, Any], cut: int) -> dict[str, Dimensions]:
    """See `mesh_core.model.ModelAdapter.shapes`."""
    width, axes = config["num_attention_heads"] * config["attention_head_dim"], len(config["axes_dims_rope"])
    doubles = config["num_layers"]
    tokens = "text+image" if cut and cut >= doubles else "image"
    return {
        "hidden_states": ("batch", tokens, width if cut else config["in_channels"]),
        "encoder_hidden_states": ("batch", "text", width if cut else config["joint_attention_dim"]),
        "temb": ("batch", width),
        "timestep": ("batch",),
        "guidance": ("batch",),
        "img_ids": ("image", axes),
        "txt_ids": ("text", axes),
    }


def scope_of(name: str, config: Mapping[str, Any]) -> BlockSpan:
    """The blocks that need a parameter, by its name in diffusers."""
    doubles, blocks = config["num_layers"], config["num_layers"] + config["num_single_layers"]
    own = scope_in_stacks(name, {"transformer_blocks": 0, "single_transformer_blocks": doubles})
    if own is not None:
        return own
    kind = name.partition(".")[0]
    if kind.startswith("double_stream_modulation"):
        return BlockSpan(0, doubles)
    if kind == "single_stream_modulation":
        return BlockSpan(doubles, blocks)
    return BlockSpan(blocks - 1, blocks) if kind in ("norm_out", "proj_out") else BlockSpan(0, 1)
