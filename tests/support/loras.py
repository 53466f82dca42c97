"""LoRAs for tests: random ones for the small models, in the namings of trainers, and what they must do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

RANK = 3


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 0.2) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def peft(
    shapes: Mapping[str, tuple[int, ...]], *, rank: int = RANK, seed: int = 0, prefix: str = "transformer."
) -> dict[str, Tensor]:
    """A plain LoRA of the modules with weights of these shapes, in PEFT's naming."""
    state = {}
    for i, (module, (rows, columns)) in enumerate(sorted(shapes.items())):
        state[f"{prefix}{module}.lora_A.weight"] = randn(rank, columns, seed=seed + 2 * i)
        state[f"{prefix}{module}.lora_B.weight"] = randn(rows, rank, seed=seed + 2 * i + 1)
    return state


def save(path: Path, state: Mapping[str, Tensor], **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata=metadata or None)
    return path


def modules(model: torch.nn.Module, *ends: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the linear layers whose names end with one of ``ends``; all of them without any."""
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and (not ends or name.endswith(ends))
    }
