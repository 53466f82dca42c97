"""Write the transformer as one file in the naming of Black Forest Labs, which ComfyUI reads."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from common import EXAMPLE
from safetensors.torch import load_file, save_file

WHOLE = {
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
DOUBLE = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")


def new_name(module: str) -> tuple[str, str | None]:
    """The name of a module in the single file, and which third of it where three are fused."""
    match = BLOCK.fullmatch(module)
    if not match:
        return WHOLE[module], None
    single, index, part = match.groups()
    if single:
        return f"single_blocks.{index}.{SINGLE[part]}", None
    for fused, parts in FUSED.items():
        if part in parts:
            return f"double_blocks.{index}.{fused}", "qkv"[parts.index(part)]
    return f"double_blocks.{index}.{DOUBLE[part]}", None


def convert(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename every tensor, fuse q, k and v, and order the last modulation as (shift, scale)."""
    made: dict[str, torch.Tensor] = {}
    thirds: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in weights.items():
        name, third = new_name(key.removesuffix(".weight"))
        suffix = ".scale" if name.endswith("_norm") else ".weight"
        if third:
            thirds.setdefault(name + suffix, {})[third] = tensor
        elif name.startswith("final_layer.adaLN"):
            scale, shift = tensor.chunk(2)
            made[name + suffix] = torch.cat([shift, scale])
        else:
            made[name + suffix] = tensor
    made |= {name: torch.cat([parts[k] for k in "qkv"]) for name, parts in thirds.items()}
    return {k: v.contiguous() for k, v in made.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=EXAMPLE / "model")
    parser.add_argument("to", type=Path, nargs="?", default=Path("tiny-klein.safetensors"))
    arguments = parser.parse_args()
    weights = load_file(arguments.model / "transformer" / "diffusion_pytorch_model.safetensors")
    arguments.to.parent.mkdir(parents=True, exist_ok=True)
    save_file(convert(weights), arguments.to, metadata={"format": "pt"})
    print(f"{arguments.to}: {arguments.to.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
