"""diff and set: a tensor as large as the weight that is added to it, or put in its place."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from torch import Tensor

from mesh_core.loras.algorithms.algorithm import Algorithm, Shapes, Tensors


def _added(weight: Tensor, t: Tensors, alpha: float | None, strength: float) -> Tensor:
    amount = strength if alpha is None else strength * alpha
    return weight + amount * t["diff"].reshape(weight.shape)


def _replaced(weight: Tensor, t: Tensors, alpha: float | None, strength: float) -> Tensor:
    # As in ComfyUI, a value that is set has no strength.
    return t["value"].reshape(weight.shape).clone()


def _same_size(role: str) -> Callable[[tuple[int, ...], Shapes], bool]:
    return lambda shape, s: s[role] == shape or (prod(s[role]), s[role][:1]) == (prod(shape), shape[:1])


DIFF = Algorithm(("diff",), (), _same_size("diff"), _added, 3)
"""What is added to the weight, ``alpha`` times."""

SET = Algorithm(("value",), (), _same_size("value"), _replaced, 2)
"""What takes the place of the weight."""
