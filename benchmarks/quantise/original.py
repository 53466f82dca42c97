"""A model as its authors' single files have it: names and fused tensors from the family's own description of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mesh_core.builtin import installed_plugins
from mesh_core.model.checkpoint import read_header
from mesh_core.model.library import Checkpoint, recognise
from mesh_core.model.weights import WeightReader


def original(path: Path) -> tuple[Checkpoint, dict[str, Tensor]]:
    """The checkpoint at ``path``, whose weights are plain numbers, and its tensors under the authors' names.

    Raises:
        ValueError: the family describes no naming that covers all of its parameters.
    """
    checkpoint = recognise(read_header(path), installed_plugins())
    spec, reader = checkpoint.spec, WeightReader(checkpoint.header)
    layout = next((one for one in checkpoint.adapter.layouts(spec) if one.keys() >= spec.parameters.keys()), None)
    if layout is None:
        raise ValueError(f"{spec.family} describes no naming of single files")
    rows: dict[str, list[tuple[int, Tensor]]] = {}
    for name, parameter in spec.parameters.items():
        values, at = reader.read(parameter), 0
        for piece in layout[name]:
            count = len(values) if piece.stop is None else piece.stop - piece.start
            rows.setdefault(piece.tensor, []).append((piece.start, values[at : at + count]))
            at += count
    return checkpoint, {
        name: torch.cat([part for _, part in sorted(parts, key=lambda item: item[0])]) for name, parts in rows.items()
    }
