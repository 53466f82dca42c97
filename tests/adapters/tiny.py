"""Tiny FLUX.2 transformers with random weights, and inputs for them. Large enough to have every kind of block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import save_file


def transformer(
    *,
    guidance: bool,
    doubles: int = 2,
    singles: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Flux2Transformer2DModel:
    """Width 64, 2 heads of 32, unless ``changes`` of its configuration say otherwise."""
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": doubles,
        "num_single_layers": singles,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (8, 8, 8, 8),
        "guidance_embeds": guidance,
        **changes,
    }
    model = Flux2Transformer2DModel(**config)
    # Norm weights are ones when they are new; random ones show whether each lands in its place.
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model.to(dtype).eval().requires_grad_(False)


def saved(folder: Path, **options: Any) -> Path:
    """Klein's architecture on disk at ``folder``; options of `transformer`."""
    transformer(guidance=False, **options).save_pretrained(folder)
    return folder


def inputs(
    *,
    guidance: bool,
    batch: int = 1,
    height: int = 4,
    width: int = 4,
    references: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> dict[str, Any]:
    """Arguments of forward(): latents of ``height`` x ``width`` tokens, and as many again per reference image."""
    torch.manual_seed(seed)
    text = 7
    grids = []
    for image in range(references + 1):
        ids = torch.zeros(height * width, 4, dtype=torch.int64)
        ids[:, 0] = 10 * image
        ids[:, 1] = torch.arange(height).repeat_interleave(width)
        ids[:, 2] = torch.arange(width).repeat(height)
        grids.append(ids)
    img_ids = torch.cat(grids)
    txt_ids = torch.zeros(text, 4, dtype=torch.int64)
    txt_ids[:, 3] = torch.arange(text)
    return {
        "hidden_states": torch.randn(batch, len(img_ids), 16).to(dtype),
        "encoder_hidden_states": torch.randn(batch, text, 48).to(dtype),
        "timestep": torch.full((batch,), 0.731).to(dtype),
        "img_ids": img_ids.expand(batch, -1, -1),
        "txt_ids": txt_ids.expand(batch, -1, -1),
        "guidance": torch.full((batch,), 3.5) if guidance else None,
    }


def save_single_file(model: Flux2Transformer2DModel, path: Path, prefix: str = "") -> None:
    """The model as one file in Black Forest Labs naming."""
    save_file({prefix + k: v.contiguous() for k, v in to_original(model).items()}, path)


def to_original(model: Flux2Transformer2DModel) -> dict[str, torch.Tensor]:
    """State dict in Black Forest Labs naming, written independently of the adapter's tables."""
    source = dict(model.state_dict())
    out: dict[str, torch.Tensor] = {}
    for name in list(source):
        if name.endswith("attn.to_q.weight"):
            block = name.split(".")[1]
            stem = name.removesuffix("to_q.weight")
            out[f"double_blocks.{block}.img_attn.qkv.weight"] = torch.cat(
                [source.pop(f"{stem}to_{x}.weight") for x in "qkv"]
            )
            out[f"double_blocks.{block}.txt_attn.qkv.weight"] = torch.cat(
                [source.pop(f"{stem}add_{x}_proj.weight") for x in "qkv"]
            )
    scale, shift = source.pop("norm_out.linear.weight").chunk(2)
    out["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    renames = {
        "x_embedder.": "img_in.",
        "context_embedder.": "txt_in.",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "proj_out.": "final_layer.linear.",
        "_modulation_img.linear": "_modulation_img.lin",
        "_modulation_txt.linear": "_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
        "single_transformer_blocks.": "single_blocks.",
        "transformer_blocks.": "double_blocks.",
        "attn.to_qkv_mlp_proj": "linear1",
        "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
        "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff.linear_in": "img_mlp.0",
        "ff.linear_out": "img_mlp.2",
        "ff_context.linear_in": "txt_mlp.0",
        "ff_context.linear_out": "txt_mlp.2",
    }
    for name, value in source.items():
        single = name.startswith("single_transformer_blocks.")
        new = name.replace("attn.to_out.weight", "linear2.weight") if single else name
        norms = {"q": "query_norm", "k": "key_norm"}
        for short, long in norms.items():
            target = f"norm.{long}.scale" if single else f"img_attn.norm.{long}.scale"
            new = new.replace(f"attn.norm_{short}.weight", target)
        for old, renamed in renames.items():
            new = new.replace(old, renamed)
        out[new] = value
    return out
