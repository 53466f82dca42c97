"""glora: the change is a product of small tensors, plus another one of the weight itself with such a product."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from mesh_core.loras.algorithms.adding import add
from mesh_core.loras.algorithms.algorithm import DECOMPOSED, Algorithm, Shapes, Tensors


def _glora_rank(shape: tuple[int, ...], s: Shapes) -> tuple[int, bool] | None:
    """The rank, and whether the tensors are laid out as early versions of LyCORIS did; None if neither fits."""
    a1, a2, b1, b2 = ((s[n][0], prod(s[n][1:])) for n in ("a1", "a2", "b1", "b2"))
    old = b2[1] == b1[0] == a1[0] == a2[1]
    new = b2[0] == b1[1] == a1[1] == a2[0]
    if new and not (old and a2[0] == shape[0] == shape[1]):
        return a2[0], False
    return (a1[0], True) if old else None


def _glora_fits(shape: tuple[int, ...], s: Shapes) -> bool:
    found = _glora_rank(shape, s)
    if found is None:
        return False
    columns = prod(shape[1:])
    a1, a2, b1, b2 = ((s[n][0], prod(s[n][1:])) for n in ("a1", "a2", "b1", "b2"))
    if found[1]:
        return (a2[0], a1[1], b2[0], b1[1]) == (columns, columns, shape[0], columns)
    return (a1[0], a2[1], b1[0], b2[1]) == (shape[1], shape[1], shape[0], columns)


def _glora(weight: Tensor, t: Tensors, alpha: float | None, strength: float) -> Tensor:
    found = _glora_rank(tuple(weight.shape), {role: tuple(x.shape) for role, x in t.items()})
    assert found is not None
    rank, old = found
    a1, a2, b1, b2 = (t[n].flatten(1) for n in ("a1", "a2", "b1", "b2"))
    if old:
        delta = (b2 @ b1 + weight.flatten(1) @ a2 @ a1).reshape(weight.shape)
    else:
        inner = torch.einsum("o i ..., i j -> o j ...", torch.einsum("o i ..., i j -> o j ...", weight, a1), a2)
        delta = (weight @ a1 @ a2 if weight.dim() == 2 else inner) + (b1 @ b2).reshape(weight.shape)
    return add(weight, delta, t, alpha / rank if alpha is not None else 1.0, strength)


GLORA = Algorithm(("a1", "a2", "b1", "b2"), DECOMPOSED, _glora_fits, _glora, 5)
"""``b1 @ b2 + weight @ a1 @ a2``, and the same in the order of LyCORIS's early versions."""
