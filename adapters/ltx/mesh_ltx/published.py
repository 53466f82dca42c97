"""What the published models say of themselves, for copies of them whose metadata got lost: some GGUF files.

Heads, rotary embeddings and multipliers show in no weight. Only a file that has the names and shapes of LTX-2 or
LTX-2.3, all of them different from other generations', is taken for one. The values are those of diffusers'
``scripts/convert_ltx2_to_diffusers.py``, which are equal for both.
"""

from __future__ import annotations

from typing import Any

from mesh_core.model import CheckpointHeader

_SAID: dict[str, Any] = {
    "in_channels": 128,
    "out_channels": 128,
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "cross_attention_dim": 4096,
    "audio_in_channels": 128,
    "audio_out_channels": 128,
    "audio_num_attention_heads": 32,
    "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048,
    "num_layers": 48,
    "caption_channels": 3840,
    "norm_eps": 1e-6,
    "positional_embedding_theta": 10000.0,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "audio_positional_embedding_max_pos": [20],
    "timestep_scale_multiplier": 1000,
    "av_ca_timestep_scale_multiplier": 1000.0,
    "rope_type": "split",
    "frequencies_precision": "float64",
}
"""The metadata entry ``config``, in Lightricks' words."""

_BOTH: dict[str, tuple[int, ...] | None] = {
    "patchify_proj.weight": (4096, 128),
    "audio_patchify_proj.weight": (2048, 128),
    "transformer_blocks.0.attn1.to_q.weight": (4096, 4096),
    "transformer_blocks.0.audio_attn1.to_q.weight": (2048, 2048),
    "transformer_blocks.0.ff.net.0.proj.bias": (16384,),
    "transformer_blocks.0.audio_ff.net.0.proj.bias": (8192,),
    "transformer_blocks.47.attn1.to_q.weight": (4096, 4096),
    "transformer_blocks.48.attn1.to_q.weight": None,
    "proj_out.weight": (128, 4096),
    "audio_proj_out.weight": (128, 2048),
    "keyframes_abs_pos_embedding": None,
}
"""Shapes of tensors; None for what must not be there."""

_OWN: dict[str, dict[str, tuple[int, ...] | None]] = {
    "2.0": {
        "caption_projection.linear_1.weight": (4096, 3840),
        "caption_projection.linear_2.weight": (4096, 4096),
        "audio_caption_projection.linear_1.weight": (2048, 3840),
        "transformer_blocks.0.attn1.to_gate_logits.weight": None,
        "transformer_blocks.0.prompt_scale_shift_table": None,
        "prompt_adaln_single.linear.weight": None,
    },
    "2.3": {
        "caption_projection.linear_2.weight": None,
        "transformer_blocks.0.attn1.to_gate_logits.weight": (32, 4096),
        "transformer_blocks.0.audio_attn1.to_gate_logits.weight": (32, 2048),
        "transformer_blocks.0.prompt_scale_shift_table": (2, 4096),
        "transformer_blocks.0.audio_prompt_scale_shift_table": (2, 2048),
        "prompt_adaln_single.linear.weight": (8192, 4096),
        "audio_prompt_adaln_single.linear.weight": (4096, 2048),
    },
}
"""By version, what tells the generations apart."""


def published_words(header: CheckpointHeader, prefix: str) -> dict[str, Any] | None:
    """What the metadata of a published model says, if ``header`` can only be of one; else None."""
    shapes = {name: info.shape for name, info in header.tensors.items()}
    for version, own in _OWN.items():
        named = header.metadata.get("model_version", version)
        if named.startswith(version) and all(shapes.get(prefix + n) == s for n, s in {**_BOTH, **own}.items()):
            return dict(_SAID)
    return None
