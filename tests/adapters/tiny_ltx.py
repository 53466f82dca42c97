"""Tiny LTX-2 transformers of both generations with random weights, and inputs for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import LTX2VideoTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

Generation = Literal["2.0", "2.3"]
FRAMES, HEIGHT, WIDTH, AUDIO_FRAMES, TEXT = 2, 2, 3, 5, 4
"""Latent frames and sides of the video, latent frames of the audio, text tokens."""

_NEWER = {
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "rope_type": "split",
}


def transformer(
    generation: Generation, *, blocks: int = 3, dtype: torch.dtype = torch.float32, **changes: Any
) -> LTX2VideoTransformer3DModel:
    """Widths 32 (2 heads of 16) and 16 (2 heads of 8)."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "audio_in_channels": 6,
        "audio_out_channels": 6,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "caption_channels": 12,
        "num_layers": blocks,
        "perturbed_attn": True,
        **(_NEWER if generation == "2.3" else {}),
        **changes,
    }
    model = LTX2VideoTransformer3DModel(**config)
    for name, parameter in model.named_parameters():
        # Norm weights are ones and markers zeros when they are new; random ones show whether each has its place.
        if "norm" in name or "keyframes" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model.to(dtype).eval().requires_grad_(False)


def inputs(
    generation: Generation,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    audio: int = AUDIO_FRAMES,
    seed: int = 1,
) -> dict[str, Any]:
    """Arguments of forward() as the text to video pipeline gives them."""
    torch.manual_seed(seed)
    tokens = FRAMES * HEIGHT * WIDTH
    widths = (12, 12) if generation == "2.0" else (32, 16)
    timestep = torch.full((), 731.25).expand(batch)
    mask = torch.ones(batch, TEXT, dtype=torch.int64)
    mask[:, 0] = 0
    return {
        "hidden_states": torch.randn(batch, tokens, 8).to(dtype),
        "audio_hidden_states": torch.randn(batch, audio, 6).to(dtype),
        "encoder_hidden_states": torch.randn(batch, TEXT, widths[0]).to(dtype),
        "audio_encoder_hidden_states": torch.randn(batch, TEXT, widths[1]).to(dtype),
        "timestep": timestep,
        "sigma": timestep,
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
        "fps": 25.0,
        "audio_num_frames": audio,
        "use_cross_timestep": generation == "2.3",
    }


def image_to_video(given: dict[str, Any]) -> dict[str, Any]:
    """The first latent frame is given: its tokens have timestep 0, the others keep theirs."""
    batch, tokens, _ = given["hidden_states"].shape
    held = torch.zeros(batch, tokens)
    held[:, : HEIGHT * WIDTH] = 1.0
    timestep = given["timestep"]
    return {**given, "timestep": timestep.unsqueeze(-1) * (1 - held), "audio_timestep": timestep}


def coordinates(model: LTX2VideoTransformer3DModel, given: dict[str, Any]) -> dict[str, Any]:
    """With the coordinates that a pipeline computes once."""
    batch = len(given["hidden_states"])
    video = model.rope.prepare_video_coords(batch, FRAMES, HEIGHT, WIDTH, torch.device("cpu"), fps=given["fps"])
    audio = model.audio_rope.prepare_audio_coords(batch, given["audio_num_frames"], torch.device("cpu"))
    return {**given, "video_coords": video, "audio_coords": audio}


def save_single_file(
    model: LTX2VideoTransformer3DModel, path: Path, prefix: str = "", config: dict[str, Any] | None = None
) -> None:
    """The model as one file in Lightricks naming, beside tensors of other parts."""
    tensors = {prefix + name: value.contiguous() for name, value in to_original(model).items()}
    tensors[f"{prefix}video_embeddings_connector.learnable_registers"] = torch.zeros(2, 4)
    tensors["vae.per_channel_statistics.mean-of-means"] = torch.zeros(8)
    config = original_config(model) if config is None else config
    save_tensors(tensors, path, config)


def save_tensors(tensors: dict[str, Tensor], path: Path, config: dict[str, Any]) -> None:
    """Tensors of a model with its dimensions in the metadata, beside those of a VAE."""
    save_file(tensors, path, {"config": json.dumps({"transformer": config, "vae": {"latent_channels": 8}})})


def to_original(model: LTX2VideoTransformer3DModel) -> dict[str, Tensor]:
    """State dict in Lightricks naming."""
    return {original_name(name): value for name, value in model.state_dict().items()}


def original_name(name: str) -> str:
    """What Lightricks calls a parameter of diffusers, written independently of the adapter's tables."""
    renames = {
        "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
        "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
        "av_cross_attn_video_scale_shift.": "av_ca_video_scale_shift_adaln_single.",
        "av_cross_attn_audio_scale_shift.": "av_ca_audio_scale_shift_adaln_single.",
        "av_cross_attn_video_a2v_gate.": "av_ca_a2v_gate_adaln_single.",
        "av_cross_attn_audio_v2a_gate.": "av_ca_v2a_gate_adaln_single.",
        "prompt_adaln.": "prompt_adaln_single.",
        "time_embed.": "adaln_single.",
        "proj_in.": "patchify_proj.",
        ".norm_q.": ".q_norm.",
        ".norm_k.": ".k_norm.",
    }
    for old, new in renames.items():
        name = name.replace(old, new)
    return name


def original_config(model: LTX2VideoTransformer3DModel) -> dict[str, Any]:
    """The dimensions as the published files state them."""
    config = model.config
    newer = config.cross_attn_mod
    return {
        "_class_name": "AVTransformer3DModel",
        "attention_head_dim": config.attention_head_dim,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "cross_attention_dim": config.cross_attention_dim,
        "caption_channels": config.caption_channels,
        "norm_eps": config.norm_eps,
        "audio_num_attention_heads": config.audio_num_attention_heads,
        "audio_attention_head_dim": config.audio_attention_head_dim,
        "audio_in_channels": config.audio_in_channels,
        "audio_out_channels": config.audio_out_channels,
        "audio_cross_attention_dim": config.audio_cross_attention_dim,
        "audio_positional_embedding_max_pos": [20],
        "use_middle_indices_grid": True,
        "causal_temporal_positioning": True,
        "apply_gated_attention": newer,
        "cross_attention_adaln": newer,
        "rope_type": config.rope_type,
        "frequencies_precision": "float64",
        "positional_embedding_theta": 10000.0,
        "positional_embedding_max_pos": [20, 2048, 2048],
        "timestep_scale_multiplier": 1000,
        "av_ca_timestep_scale_multiplier": 1000.0,
    }
