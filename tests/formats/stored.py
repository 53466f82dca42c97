"""Small checkpoints of quantised layers, read as a worker reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mesh_core.builtin import installed_plugins
from mesh_core.model.checkpoint import CheckpointHeader, read_header
from mesh_core.model.claims import with_stored_weights
from mesh_core.model.spans import BlockSpan
from mesh_core.model.spec import ParameterSpec, Piece
from mesh_core.model.stored_weight import StoredWeight
from mesh_core.model.weights import WeightReader

SCOPE = BlockSpan(0, 1)


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Normally distributed, but for a row that is half of zeros."""
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05
    made[rows // 2, : columns // 2] = 0
    return made


def saved(
    folder: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> CheckpointHeader:
    """What the core's formats make of a folder with these."""
    folder.mkdir(exist_ok=True)
    whole = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(whole, folder / "diffusion_pytorch_model.safetensors", dict(metadata or {}))
    (folder / "config.json").write_text(json.dumps(config or {}))
    return with_stored_weights(read_header(folder), installed_plugins().weight_formats().values())


def read(
    header: CheckpointHeader,
    *pieces: tuple[str, int, int],
    dtype: torch.dtype = torch.bfloat16,
    arithmetic: str = "",
) -> StoredWeight:
    """Rows of weights, one above the other: (name, start, stop) each."""
    info = header.tensors[pieces[0][0]]
    shape = (sum(stop - start for _, start, stop in pieces), *info.shape[1:])
    spec = ParameterSpec(shape, info.dtype, tuple(Piece(*piece) for piece in pieces), SCOPE)
    return WeightReader(header).read_stored(spec, dtype, arithmetic)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Zeros of both signs are told apart."""
    return first.dtype == second.dtype and torch.equal(first.view(torch.uint8), second.view(torch.uint8))
