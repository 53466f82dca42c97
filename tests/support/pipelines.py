"""A whole Klein pipeline, small enough for tests: random weights, a tokenizer of single bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from tests.adapters import tiny

SIZE = 32
"""Height and width of the images, in pixels."""

CALL: dict[str, Any] = {
    "prompt": "a red fox",
    "height": SIZE,
    "width": SIZE,
    "num_inference_steps": 2,
    "max_sequence_length": 24,
    "text_encoder_out_layers": (0, 1, 2),
    "output_type": "pt",
}
_PAD, _END = "<|endoftext|>", "<|im_end|>"


def save(folder: Path, *, distilled: bool = True, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a pipeline of 2 + 3 blocks that diffusers loads from ``folder``."""
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=260,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    pipeline = Flux2KleinPipeline(
        FlowMatchEulerDiscreteScheduler(),
        vae.to(dtype),
        encoder.to(dtype),
        _tokenizer(),
        tiny.transformer(guidance=False, dtype=dtype),
        is_distilled=distilled,
    )
    pipeline.save_pretrained(folder)


def run(pipeline: Any, **changes: Any) -> torch.Tensor:
    """The images of one call with a fixed seed, [B, 3, H, W]."""
    pipeline.set_progress_bar_config(disable=True)
    images: torch.Tensor = pipeline(**{**CALL, "generator": torch.Generator().manual_seed(3), **changes}).images
    return images


def _tokenizer() -> Qwen2Tokenizer:
    vocabulary = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary |= {_PAD: 256, _END: 257}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], pad_token=_PAD, eos_token=_END)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}" + _END
    return tokenizer
