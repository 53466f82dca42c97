"""The dimensions of a single file, which stand in its metadata entry ``config`` as JSON, in Lightricks' words."""

from __future__ import annotations

import json
from typing import Any

from mesh_core.errors import CheckpointCorrupt, CheckpointUnrecognised
from mesh_core.model import CheckpointHeader
from mesh_ltx.published import published_words

_CONFIG = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "num_attention_heads": "num_attention_heads",
    "attention_head_dim": "attention_head_dim",
    "cross_attention_dim": "cross_attention_dim",
    "audio_in_channels": "audio_in_channels",
    "audio_out_channels": "audio_out_channels",
    "audio_num_attention_heads": "audio_num_attention_heads",
    "audio_attention_head_dim": "audio_attention_head_dim",
    "audio_cross_attention_dim": "audio_cross_attention_dim",
    "num_layers": "num_layers",
    "caption_channels": "caption_channels",
    "norm_eps": "norm_eps",
    "positional_embedding_theta": "rope_theta",
    "timestep_scale_multiplier": "timestep_scale_multiplier",
    "av_ca_timestep_scale_multiplier": "cross_attn_timestep_scale_multiplier",
    "rope_type": "rope_type",
    "ff_bias": "ff_bias",
    "audio_ff_bias": "audio_ff_bias",
    "use_prompt_adaln_single": "use_prompt_adaln_single",
    "use_keyframes_abs_pos_embedding": "use_keyframes_abs_pos_embedding",
}
"""Names in the file's metadata -> arguments of the model class."""

_FIXED = {"use_middle_indices_grid": True, "causal_temporal_positioning": True}
"""What the model class always does; a file that asks for another thing is refused."""


def config_from_metadata(header: CheckpointHeader, prefix: str) -> dict[str, Any]:
    """Arguments of the model class from the metadata of a single file, and from which tensors it has.

    Raises:
        CheckpointUnrecognised: the file says nothing of its dimensions, or asks for what the model class does not do.
        CheckpointCorrupt: what it says is unreadable.
    """
    given = _metadata(header, prefix)
    for name, value in _FIXED.items():
        if given.get(name, value) != value:
            raise CheckpointUnrecognised(
                f"{header.path} asks for {name}={given[name]}; only {value} is computed.", hint="another checkpoint"
            )
    config = {ours: given[theirs] for theirs, ours in _CONFIG.items() if theirs in given}
    has = header.tensors.keys()
    # With one linear layer instead of two, the projection stands before the text connector and is the connector's.
    config["use_prompt_embeddings"] = f"{prefix}caption_projection.linear_2.weight" in has
    gated = f"{prefix}transformer_blocks.0.attn1.to_gate_logits.weight" in has
    modulated = f"{prefix}transformer_blocks.0.prompt_scale_shift_table" in has
    config |= {"gated_attn": gated, "audio_gated_attn": gated}
    config |= {"cross_attn_mod": modulated, "audio_cross_attn_mod": modulated}
    # Guidance that perturbs attention came with the gates; without a mask both processors compute the same.
    config["perturbed_attn"] = True
    config["rope_type"] = given.get("rope_type", "interleaved")
    config["rope_double_precision"] = given.get("frequencies_precision") == "float64"
    config.setdefault("cross_attn_timestep_scale_multiplier", 1)
    for theirs, ours in (("positional_embedding_max_pos", ""), ("audio_positional_embedding_max_pos", "audio_")):
        if theirs in given:
            config |= _positions(header, given[theirs], ours)
    return config


def _positions(header: CheckpointHeader, value: Any, stream: str) -> dict[str, int]:
    names = ("pos_embed_max_pos",) if stream else ("pos_embed_max_pos", "base_height", "base_width")
    if not isinstance(value, list) or len(value) != len(names):
        raise CheckpointCorrupt(f"{header.path}: its metadata has the positions {value!r}.")
    return {f"{stream}{name}": number for name, number in zip(names, value, strict=True)}


def _metadata(header: CheckpointHeader, prefix: str) -> dict[str, Any]:
    text = header.metadata.get("config")
    if text is None:
        published = published_words(header, prefix)
        if published is not None:
            return published
        raise CheckpointUnrecognised(
            f"{header.path} is an LTX-2 transformer whose metadata does not say its dimensions (entry 'config'), and "
            "none of the published ones.",
            hint="the file as Lightricks published it, or a folder saved by diffusers",
        )
    try:
        given = json.loads(text)["transformer"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointCorrupt(f"{header.path}: its metadata entry 'config' is damaged ({error}).") from error
    if not isinstance(given, dict):
        raise CheckpointCorrupt(f"{header.path}: its metadata entry 'config' describes no transformer.")
    return given
