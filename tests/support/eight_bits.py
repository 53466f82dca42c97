"""A way to store weights that tests own: whole numbers of 8 bits with a scale for each row, and models stored so.

``python -m tests.support.eight_bits serve ...`` is ``mesh`` with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mesh_core.builtin import builtin_plugins, load_plugins
from mesh_core.hookspecs import hookimpl
from mesh_core.model.checkpoint import CheckpointHeader
from mesh_core.model.stored import Claim, Parts, StoredTensor, WeightFormat
from mesh_core.plugins.registry import Plugins

LABEL, ARITHMETIC = "test-eight/I8", "test-eight/rows"


class EightBits(WeightFormat):
    """``X.weight`` I8 and ``X.row_sizes`` F32 [rows]."""

    name = "test-eight"
    rows_in_file: ClassVar[frozenset[str]] = frozenset({"codes", "scales"})

    def claim(self, header: CheckpointHeader) -> Claim:
        found = {}
        for name, info in header.tensors.items():
            scales = header.tensors.get(name.removesuffix(".weight") + ".row_sizes")
            if info.dtype == "I8" and scales is not None:
                found[name] = StoredTensor(self, "I8", info.shape, {"codes": info, "scales": scales})
        return Claim(found)

    def in_memory(self, stored: StoredTensor, parts: Parts, start: int, stop: int) -> dict[str, Tensor]:
        return dict(parts)

    def nbytes(self, stored: StoredTensor, rows: int) -> int:
        return rows * (stored.shape[1] + 4)

    def arithmetics(self, kind: str, dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
        return (ARITHMETIC,)

    def dequantise(
        self, parts: Parts, kind: str, shape: tuple[int, ...], dtype: torch.dtype, arithmetic: str
    ) -> Tensor:
        return (parts["codes"] * parts["scales"].reshape(-1, 1)).to(dtype)


class _Plugin:
    @hookimpl
    def mesh_register_weight_formats(self, register: Callable[[WeightFormat], None]) -> None:
        register(EightBits())


def stored(weight: Tensor) -> dict[str, Tensor]:
    """The parts of a weight [rows, columns]."""
    scales = weight.float().abs().amax(dim=1).clamp(min=1e-6) / 127
    return {"codes": (weight.float() / scales[:, None]).round().to(torch.int8), "scales": scales}


def store(file: Path, names: Callable[[str], bool]) -> None:
    """Store the weights of that name in a safetensors file with 8 bits, in place."""
    made: dict[str, Tensor] = {}
    for name, tensor in load_file(file).items():
        if names(name) and tensor.ndim == 2:
            parts = stored(tensor)
            made |= {name: parts["codes"], name.removesuffix(".weight") + ".row_sizes": parts["scales"]}
        else:
            made[name] = tensor
    save_file(made, file)


def plugins() -> Plugins:
    """Those of this environment, and this format."""
    with patch("mesh_core.builtin.builtin_plugins", _builtin):
        return load_plugins()


def _builtin() -> Mapping[str, Any]:
    return {**builtin_plugins(), "test.eight-bits": _Plugin()}


if __name__ == "__main__":
    from mesh_core.cli import main

    with patch("mesh_core.builtin.builtin_plugins", _builtin):
        main()
