"""The dimensions of ComfyUI's ``LTXAVModel``, in the words of a file's metadata. Imports nothing of ComfyUI."""

from __future__ import annotations

from typing import Any


def config_of_model(model: Any) -> dict[str, Any]:
    """What `mesh_ltx.metadata.config_from_metadata` reads of a file, from the model's attributes."""
    rope = model.split_positional_embedding
    names = (
        "in_channels",
        "num_attention_heads",
        "attention_head_dim",
        "cross_attention_dim",
        "audio_in_channels",
        "audio_num_attention_heads",
        "audio_attention_head_dim",
        "audio_cross_attention_dim",
        "caption_channels",
        "num_layers",
        "positional_embedding_theta",
        "positional_embedding_max_pos",
        "audio_positional_embedding_max_pos",
        "use_middle_indices_grid",
        "causal_temporal_positioning",
        "timestep_scale_multiplier",
        "av_ca_timestep_scale_multiplier",
        "ff_bias",
        "audio_ff_bias",
        "use_prompt_adaln_single",
        "use_keyframes_abs_pos_embedding",
    )
    config = {name: getattr(model, name) for name in names if hasattr(model, name)}
    return {
        **config,
        "out_channels": model.out_channels,
        "audio_out_channels": model.audio_out_channels,
        "rope_type": getattr(rope, "value", rope),
        "frequencies_precision": "float64" if model.freq_grid_generator.__name__.endswith("_np") else "float32",
    }
