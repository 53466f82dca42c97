"""Rewrite a LoRA from PEFT/diffusers naming to kohya naming (`lora_unet_...`, fused q, k, v).

The three low-rank updates of q, k and v become one of three times the rank with a
block-diagonal up matrix: exactly the same change of the weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from single_file import new_name


def convert(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`transformer.<module>.lora_{A,B}.weight` to `lora_unet_<module>.lora_{down,up}.weight` and `.alpha`."""
    pairs: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
    for key, down in weights.items():
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        name, third = new_name(module)
        up = weights[key.replace(".lora_A.", ".lora_B.")]
        pairs.setdefault("lora_unet_" + name.replace(".", "_"), {})[third or "q"] = (down, up)
    made: dict[str, torch.Tensor] = {}
    for name, parts in pairs.items():
        ordered = [parts[k] for k in "qkv" if k in parts]
        made[name + ".lora_down.weight"] = torch.cat([down for down, _ in ordered]).contiguous()
        made[name + ".lora_up.weight"] = torch.block_diag(*[up for _, up in ordered]).contiguous()
        made[name + ".alpha"] = torch.tensor(float(made[name + ".lora_down.weight"].shape[0]))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("to", type=Path)
    arguments = parser.parse_args()
    save_file(convert(load_file(arguments.source)), arguments.to, metadata={"format": "pt"})
    print(f"{arguments.to}: {arguments.to.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
