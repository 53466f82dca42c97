"""What an algorithm is: which tensors it takes, whether they fit a weight, and what they do to it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

Tensors = Mapping[str, Tensor]
"""The tensors of a patch by role, in float32."""

Shapes = Mapping[str, tuple[int, ...]]
"""Their shapes by role."""

DECOMPOSED = ("dora_scale",)
"""The role of a tensor with which any change is weight-decomposed, as ComfyUI does it."""

_LEAST_WIDTH = 1024
"""Ranks up to this are accepted for weights that are narrower, too."""


@dataclass(frozen=True)
class Algorithm:
    """One kind of patch.

    Attributes:
        required, optional: roles of its tensors.
        fits: whether tensors of these shapes give a change of a weight of this shape.
        apply: (weight, tensors, alpha, strength) -> a new weight; changes none of them.
        copies: of the weight, itself included, that ``apply`` holds at most. With a decomposition there are more, see
            `most_copies`.
        most_of_tensors: how much of the tensors themselves it holds at most, in their own size in float32.
        rank_role: the tensor whose first dimension is the rank that ``alpha`` is divided by, if that is all to it.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    fits: Callable[[tuple[int, ...], Shapes], bool]
    apply: Callable[[Tensor, Tensors, float | None, float], Tensor]
    copies: int
    rank_role: str = ""
    most_of_tensors: int = 1

    def most_copies(self, roles: Collection[str]) -> int:
        """Of the weight, that changing it with tensors of these roles holds at most."""
        return self.copies + (3 if "dora_scale" in roles else 1 if "magnitude" in roles else 0)

    def problem(self, shape: tuple[int, ...], shapes: Shapes) -> str:
        """Why tensors of ``shapes`` cannot patch a weight of ``shape``; empty if they can."""
        missing = [role for role in self.required if role not in shapes]
        unknown = sorted(shapes.keys() - {*self.required, *self.optional})
        if missing or unknown:
            return f"it lacks {missing[0]}" if missing else f"it has no use for {unknown[0][:64]}"
        width = max(1, *shape[:1], prod(shape[1:]))
        rank = max(width, _LEAST_WIDTH)
        for role, tensor in shapes.items():
            if prod(tensor) > width * rank:
                return f"{role} is larger than any rank up to {rank} needs"
        try:
            fits = self.fits(shape, shapes)
        except IndexError:
            fits = False
        if not fits:
            return "rank or shape differ"
        for role in ("dora_scale", "magnitude"):
            if role in shapes and prod(shapes[role]) not in (shape[0], prod(shape[1:2])):
                return f"{role} has another size"
        return ""
