"""Where each parameter of the LTX-2 transformer lies in a file: diffusers naming or Lightricks naming.

The second is what the published single files and ComfyUI use, with or without ``model.diffusion_model.`` before
each name; every parameter is one whole tensor in both. Follows diffusers ``convert_ltx2_transformer_to_diffusers``
and its LoRA conversion, which adds LTX-2.3.
"""

from __future__ import annotations

from collections.abc import Container

from mesh_core.errors import CheckpointUnrecognised
from mesh_core.model import CheckpointHeader, Piece
from mesh_core.model.adapting import PREFIXES, find_naming

_MARKS = {
    "diffusers": "av_cross_attn_video_scale_shift.linear.weight",
    "original": "av_ca_video_scale_shift_adaln_single.linear.weight",
}
_VIDEO_ONLY = {"diffusers": ("proj_in.weight", "time_embed.linear.weight"), "original": ("patchify_proj.weight",)}
_BLOCK = "transformer_blocks.0.attn1.to_q.weight"

_TOP = {
    "proj_in": "patchify_proj",
    "audio_proj_in": "audio_patchify_proj",
    "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single",
    "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
}
_IN_BLOCK = {
    "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
    "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}


def find_layout(tensors: Container[str]) -> tuple[str, bool] | None:
    """(prefix, whether the naming is that of Lightricks), or None if this is no LTX transformer with two streams."""
    found = find_naming(tensors, _MARKS)
    return None if found is None else (found[0], found[1] == "original")


def refuse_video_only(header: CheckpointHeader) -> None:
    """Name what a transformer of LTX's older, video-only architecture is; do nothing for any other checkpoint.

    Raises:
        CheckpointUnrecognised: LTX-Video 0.9, or the video half of an LTX-2.
    """
    names = header.tensors
    for prefix in PREFIXES:
        for needed in _VIDEO_ONLY.values():
            if all(prefix + name in names for name in (*needed, _BLOCK)) and f"{prefix}scale_shift_table" in names:
                raise CheckpointUnrecognised(
                    f"{header.path} is a video-only LTX transformer (LTX-Video 0.9, or LTX-2 without its audio "
                    "stream): it can make no audio, and this adapter runs the two streams of LTX-2 together.",
                    hint="a checkpoint of LTX-2 or LTX-2.3 with audio",
                )


def pieces_of(parameter: str, prefix: str, original: bool) -> tuple[Piece, ...]:
    """The file tensor that is ``parameter``. It may not exist."""
    return (Piece(prefix + (original_name(parameter) if original else parameter)),)


def original_name(parameter: str) -> str:
    """A parameter as Lightricks and ComfyUI call it."""
    top, dot, rest = parameter.partition(".")
    if top == "transformer_blocks":
        return ".".join(_IN_BLOCK.get(part, part) for part in parameter.split("."))
    return _TOP.get(top, top) + dot + rest
