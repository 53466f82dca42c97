"""Weights as a host program holds them in memory: plain numbers, stored weights, or a class of its own for a format."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mesh_core.errors import CheckpointUnrecognised
from mesh_core.model.stored_weight import StoredWeight
from mesh_core.plugins.registry import Plugins


def as_stored(name: str, tensor: Tensor, plugins: Plugins) -> Tensor:
    """The tensor itself where it is a plain or a stored one, else the stored weight that it is; shares its memory.

    Args:
        name: for the error.

    Raises:
        CheckpointUnrecognised: a tensor of another class than torch's own, which no format knows.
    """
    if type(tensor) in (Tensor, nn.Parameter, StoredWeight):
        return tensor
    for format in plugins.weight_formats().values():
        found = format.held(tensor)
        if found is not None:
            kind, shape, parts = found
            arithmetic = format.arithmetics(kind, torch.bfloat16, tensor.device)
            return StoredWeight(format, kind, shape, torch.bfloat16, parts, next(iter(arithmetic), ""))
    raise CheckpointUnrecognised(
        f"{name} is a {type(tensor).__name__}, which is no plain tensor and in none of the formats that are read.",
        hint="the same model in bfloat16, or quantised in a format of docs/reference/weights.md",
    )
