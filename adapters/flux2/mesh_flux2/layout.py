"""Where each parameter of the FLUX.2 transformer lies in a file: diffusers naming or Black Forest Labs naming.

The second is what the published single files and ComfyUI use, with or without ``model.diffusion_model.`` before
each name. It stores query, key and value as one tensor and the output modulation as (shift, scale) where
diffusers has (scale, shift); both are rows along dimension 0, so a parameter is always some rows of some tensors.
Follows diffusers ``convert_flux2_transformer_checkpoint_to_diffusers``.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

from mesh_core.model import Piece
from mesh_core.model.adapting import find_naming

_MARKS = {"diffusers": "single_stream_modulation.linear.weight", "bfl": "single_stream_modulation.lin.weight"}

_TOP = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_DOUBLE = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_add_out": "txt_attn.proj",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_THIRDS = {
    "attn.to_q": ("img_attn.qkv", 0),
    "attn.to_k": ("img_attn.qkv", 1),
    "attn.to_v": ("img_attn.qkv", 2),
    "attn.add_q_proj": ("txt_attn.qkv", 0),
    "attn.add_k_proj": ("txt_attn.qkv", 1),
    "attn.add_v_proj": ("txt_attn.qkv", 2),
}
_SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}


def find_layout(tensors: Container[str]) -> tuple[str, bool] | None:
    """(prefix, whether the naming is that of Black Forest Labs), or None if this is no FLUX.2 transformer."""
    found = find_naming(tensors, _MARKS)
    return None if found is None else (found[0], found[1] == "bfl")


def pieces_of(parameter: str, rows: int, tensors: Container[str], prefix: str, bfl: bool) -> tuple[Piece, ...]:
    """The rows of file tensors that make ``parameter``, which has ``rows`` rows. The tensors may not exist."""
    if not bfl:
        return (Piece(prefix + parameter),)
    stem, _, leaf = parameter.rpartition(".")
    if stem == "norm_out.linear":
        source, half = f"{prefix}{_TOP[stem]}.{leaf}", rows // 2
        return (Piece(source, half, rows), Piece(source, 0, half))
    kind, _, rest = stem.partition(".")
    if kind == "transformer_blocks":
        index, _, inner = rest.partition(".")
        base = f"{prefix}double_blocks.{index}."
        if inner in _THIRDS:
            source, third = _THIRDS[inner]
            return (Piece(f"{base}{source}.{leaf}", third * rows, (third + 1) * rows),)
        return (Piece(_norm_name(f"{base}{_DOUBLE[inner]}", leaf, tensors)),)
    if kind == "single_transformer_blocks":
        index, _, inner = rest.partition(".")
        return (Piece(_norm_name(f"{prefix}single_blocks.{index}.{_SINGLE[inner]}", leaf, tensors)),)
    return (Piece(f"{prefix}{_TOP[stem]}.{leaf}"),)


def layouts(shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, tuple[Piece, ...]]]:
    """The namings in which LoRAs for the architecture come, for parameters of these shapes, beside diffusers' own:
    that of Black Forest Labs with either name of its norms' scales, query, key and value fused as diffusers fuses
    them, and the part of a single block that ComfyUI names for itself."""
    named: list[dict[str, tuple[Piece, ...]]] = [
        {name: pieces_of(name, shape[0], (), "", True) for name, shape in shapes.items()},
        {name: pieces_of(name, shape[0], _EVERYTHING, "", True) for name, shape in shapes.items()},
    ]
    fused: dict[str, tuple[Piece, ...]] = {}
    parts: dict[str, tuple[Piece, ...]] = {}
    for name, shape in shapes.items():
        stem, _, leaf = name.rpartition(".")
        for inner, (source, third) in _THIRDS.items():
            if stem.endswith(f".{inner}") and name.startswith("transformer_blocks."):
                block = stem.removesuffix(f".{inner}")
                whole = "attn.to_qkv" if source.startswith("img") else "attn.to_added_qkv"
                fused[name] = (Piece(f"{block}.{whole}.{leaf}", third * shape[0], (third + 1) * shape[0]),)
        if stem.endswith(".attn.to_qkv_mlp_proj"):
            index, width = stem.split(".")[1], shapes[f"{stem.removesuffix('to_qkv_mlp_proj')}to_out.{leaf}"][0]
            parts[name] = (Piece(f"single_blocks.{index}.linear1_qkv.{leaf}", 0, 3 * width),)
    return [*named, fused, parts]


class _Everything:
    def __contains__(self, name: object) -> bool:
        return True


_EVERYTHING = _Everything()


def _norm_name(stem: str, leaf: str, tensors: Container[str]) -> str:
    scale = f"{stem}.scale"
    # Only norms have a scale; asked about anything else, a container of everything would say yes too.
    return scale if scale in tensors and stem.endswith("_norm") else f"{stem}.{leaf}"
