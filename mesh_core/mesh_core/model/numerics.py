"""In which types, and by which arithmetic, a stage computes: with equal weights, equal numerics give equal bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Numerics:
    """Hosts choose them, workers compute with the same or say that they cannot.

    Attributes:
        dtype: of the state, and of every parameter that `others` does not have.
        others: parameters, or persistent buffers, that are held in another type, sorted by name.
        arithmetic: by label of a stored weight (`StoredTensor.label`), how it is computed with, sorted.
    """

    dtype: torch.dtype
    others: tuple[tuple[str, torch.dtype], ...] = ()
    arithmetic: tuple[tuple[str, str], ...] = ()
    _types: Mapping[str, torch.dtype] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_types", dict(self.others))

    def dtype_of(self, parameter: str) -> torch.dtype:
        """The type that a parameter is held in; for a stored weight, that of its numbers."""
        return self._types.get(parameter, self.dtype)

    def arithmetic_of(self, label: str) -> str:
        """How weights with that label are computed with.

        Raises:
            KeyError: nothing was chosen for them.
        """
        return dict(self.arithmetic)[label]
