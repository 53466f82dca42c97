"""A whole LTX-2 pipeline, small enough for tests: video and sound from random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from tests.adapters import tiny_ltx

WIDTH, HEIGHT, FRAMES = 96, 64, 9
SAMPLE_RATE = 16000
CALL: dict[str, Any] = {
    "prompt": "a red fox",
    "width": WIDTH,
    "height": HEIGHT,
    "num_frames": FRAMES,
    "num_inference_steps": 2,
    "spatio_temporal_guidance_blocks": [1],
    "max_sequence_length": 8,
    "output_type": "pt",
}
"""With every kind of guidance that the pipeline has by default: three passes of the transformer per step."""


def pipeline(*, blocks: int = 3, widen: int = 1, dtype: torch.dtype = torch.bfloat16) -> LTX2Pipeline:
    """Of the architecture of LTX-2.3, with a video codec of the published strides (8 frames, 32 x 32 pixels).

    Args:
        widen: factor on the widths of both streams, 32 and 16.
    """
    torch.manual_seed(0)
    encoder = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=Gemma3TextConfig(
                vocab_size=260,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                max_position_embeddings=64,
            ),
            vision_config=SiglipVisionConfig(
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                image_size=16,
                patch_size=8,
            ),
            mm_tokens_per_image=4,
        )
    )
    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=16 * widen,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8 * widen,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
        per_modality_projections=True,
        video_hidden_dim=32 * widen,
        audio_hidden_dim=16 * widen,
    )
    vae = AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8, 16, 32, 64),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        decoder_causal=False,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=6,
        ch_mult=(1, 1, 1),
        num_res_blocks=1,
        resolution=32,
        latent_channels=3,
        sample_rate=SAMPLE_RATE,
        mel_bins=8,
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        upsample_kernel_sizes=[16, 15, 8, 4],
        upsample_factors=[8, 5, 2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3]],
        output_sampling_rate=SAMPLE_RATE,
    )
    return LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.to(dtype),
        audio_vae=audio_vae.to(dtype),
        text_encoder=encoder.to(dtype),
        tokenizer=_tokenizer(),
        connectors=connectors.to(dtype),
        transformer=tiny_ltx.transformer(
            "2.3",
            blocks=blocks,
            dtype=dtype,
            attention_head_dim=16 * widen,
            cross_attention_dim=32 * widen,
            audio_attention_head_dim=8 * widen,
            audio_cross_attention_dim=16 * widen,
        ),
        vocoder=vocoder.to(dtype),
    )


def run(pipe: Any, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames [B, F, C, H, W] and sound [B, channels, samples] of one call with a fixed seed."""
    pipe.set_progress_bar_config(disable=True)
    output = pipe(**{**CALL, "generator": torch.Generator().manual_seed(3), **changes})
    return output.frames, output.audio


def save(folder: Path, **options: Any) -> None:
    """Write a pipeline that diffusers loads from ``folder``."""
    pipeline(**options).save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3} | {letter: i + 4 for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
