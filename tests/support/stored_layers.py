"""Layers whose weights are stored with 8 bits, and LoRAs for them made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mesh_core.loras.apply import PatchedModel
from mesh_core.loras.lora import Applied, Lora
from mesh_core.loras.patch import Patch, Rows
from mesh_core.loras.tensors import HeldTensor
from mesh_core.model.stored_weight import StoredWeight
from tests.support import eight_bits
from tests.support.loras import randn

COLUMNS = 48
ROWS = {"q": 24, "k": 24, "v": 24, "out": 32}
NAMES = [f"{name}.weight" for name in ROWS]


def stored_layer(rows: int, dtype: torch.dtype, seed: int = 0) -> nn.Linear:
    """A linear layer with ``COLUMNS`` inputs whose weight is stored; its numbers and its bias are ``dtype``."""
    layer = nn.Linear(COLUMNS, rows, dtype=dtype).requires_grad_(False)
    parts = eight_bits.stored(randn(rows, COLUMNS, seed=seed))
    weight = StoredWeight(eight_bits.EightBits(), "I8", (rows, COLUMNS), dtype, parts, eight_bits.ARITHMETIC)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def stored_model(dtype: torch.dtype = torch.bfloat16) -> nn.ModuleDict:
    """One such layer for each of ``ROWS``, of the same content every time."""
    torch.manual_seed(0)
    return nn.ModuleDict({name: stored_layer(rows, dtype, i) for i, (name, rows) in enumerate(ROWS.items())})


def with_numbers(stored: nn.ModuleDict) -> nn.ModuleDict:
    """The same layers, which hold their numbers."""
    made = nn.ModuleDict()
    for name, layer in stored.items():
        assert isinstance(layer, nn.Linear) and isinstance(layer.weight, StoredWeight)
        plain = nn.Linear(COLUMNS, ROWS[name], dtype=layer.weight.dtype).requires_grad_(False)
        plain.weight, plain.bias = nn.Parameter(layer.weight.dense(), requires_grad=False), layer.bias
        made[name] = plain
    return made


def whole(*names: str) -> list[Rows]:
    """All rows of these layers."""
    return [Rows(f"{name}.weight", 0, ROWS[name]) for name in names]


def product(rows: int, rank: int = 4, seed: int = 50, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A low-rank change of that many rows."""
    up, down = randn(rows, rank, seed=seed), randn(rank, COLUMNS, seed=seed + 1)
    return {"up": up.to(dtype), "down": down.to(dtype)}


def lora(algorithm: str, tensors: Mapping[str, Tensor], target: Sequence[Rows], alpha: float | None = None) -> Lora:
    """A LoRA of one patch."""
    sources = {role: HeldTensor(tensor) for role, tensor in tensors.items()}
    return Lora("ink", "test", (Patch(algorithm, tuple(target), sources, alpha),))


def patched(model: nn.Module, *applied: Applied, beside: bool = True) -> PatchedModel:
    """``model`` with those LoRAs."""
    made = PatchedModel(model, NAMES, beside=beside)
    made.apply(applied)
    return made
