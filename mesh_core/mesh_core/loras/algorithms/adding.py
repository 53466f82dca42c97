"""Adding a change to a weight, plainly or weight-decomposed (DoRA), as the program does for which files are made."""

from __future__ import annotations

import torch
from torch import Tensor

from mesh_core.loras.algorithms.algorithm import Tensors


def add(
    weight: Tensor, delta: Tensor, t: Tensors, scale: float, strength: float, *, plain: float | None = None
) -> Tensor:
    """``weight + strength * scale * delta``, or its weight-decomposed form; ``plain``: the scale without DoRA. Uses up
    ``delta``."""
    if "dora_scale" in t:
        return _weight_decomposed(weight, delta * scale, t["dora_scale"], strength)
    if "magnitude" in t:
        merged = weight + delta * (scale * strength)
        norm = merged.flatten(1).norm(dim=1)
        factor: Tensor = (t["magnitude"].reshape(-1) / norm).reshape(-1, *[1] * (weight.dim() - 1))
        return factor * merged
    amount = strength * (scale if plain is None else plain)
    return weight + (delta if amount == 1.0 else delta.mul_(amount))


def _weight_decomposed(weight: Tensor, delta: Tensor, dora_scale: Tensor, strength: float) -> Tensor:
    changed = weight + delta
    ones = [1] * (weight.dim() - 1)
    if dora_scale.shape[0] == changed.shape[0]:
        norm = weight.reshape(weight.shape[0], -1).norm(dim=1, keepdim=True).reshape(weight.shape[0], *ones)
    else:
        columns = changed.transpose(0, 1)
        norm = columns.reshape(columns.shape[0], -1).norm(dim=1, keepdim=True).reshape(columns.shape[0], *ones)
        norm = norm.transpose(0, 1)
    changed *= dora_scale / (norm + torch.finfo(weight.dtype).eps)
    if strength == 1.0:
        return changed
    return weight + strength * (changed - weight)
