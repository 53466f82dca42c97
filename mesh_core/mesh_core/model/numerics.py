"""In which types, and by which arithmetic, a stage computes: with equal weights, equal numerics give equal bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from mesh_core.errors import CheckpointUnrecognised
from mesh_core.model.spec import ModelSpec, ParameterSpec
from mesh_core.model.stored import WeightFormat, format_of

LORA = "lora"
"""Stands in `Numerics.arithmetic` where labels stand, for what LoRAs do to stored weights."""

BESIDE, ON_NUMBERS = "mesh/beside-1", "mesh/dense-1"

LORA_ARITHMETICS = (BESIDE, ON_NUMBERS)
"""How LoRAs change stored weights, the default first. ``BESIDE``: low-rank products are added to what the layer gives,
as PEFT does it; whatever is no such product, and with ``ON_NUMBERS`` everything, is merged in float32 into the numbers
that the weight has at that moment, which are rounded once."""


@dataclass(frozen=True)
class Numerics:
    """Hosts choose them, workers compute with the same or say that they cannot.

    Attributes:
        dtype: of the state, and of every parameter that `others` does not have.
        others: parameters that are held in another type, sorted by name.
        computed: by name, the hash of each tensor that the model's class computes, sorted, see
            `mesh_core.model.constructing`; None for those that it computes where it is loaded in ``dtype``.
        arithmetic: by label of a stored weight (`mesh_core.model.stored.StoredTensor.label`), how it is computed with,
            sorted; with stored weights also by `LORA`, see `LORA_ARITHMETICS`.
    """

    dtype: torch.dtype
    others: tuple[tuple[str, torch.dtype], ...] = ()
    arithmetic: tuple[tuple[str, str], ...] = ()
    computed: tuple[tuple[str, str], ...] | None = None
    _types: Mapping[str, torch.dtype] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_types", dict(self.others))

    def dtype_of(self, parameter: str, spec: ParameterSpec) -> torch.dtype:
        """The type that a parameter is held in; for a stored weight, that of its numbers."""
        return spec.whole_numbers or self._types.get(parameter, self.dtype)

    def arithmetic_of(self, spec: ParameterSpec) -> str:
        """How a parameter that stays as it is stored is computed with; "" for others.

        Raises:
            KeyError: nothing was chosen for its label.
        """
        return "" if spec.stored_bytes is None else dict(self.arithmetic)[spec.dtype]

    @property
    def loras_beside(self) -> bool:
        """Whether LoRAs are computed beside stored weights, where they can be."""
        return dict(self.arithmetic).get(LORA, BESIDE) == BESIDE

    def nbytes(self, name: str, spec: ParameterSpec) -> int:
        """Bytes that a parameter takes in the memory of a stage."""
        return spec.nbytes(self.dtype_of(name, spec).itemsize)


def usual_numerics(
    model: ModelSpec, dtype: torch.dtype, device: torch.device, formats: Mapping[str, WeightFormat]
) -> Numerics:
    """What a stage computes in where nobody asks for anything else: the formats' default arithmetic on ``device``.

    Raises:
        CheckpointUnrecognised: this machine cannot compute with weights of some kind.
    """
    labels = labels_of(model.parameters.values())
    return Numerics(dtype, (), with_loras({label: _first(label, dtype, device, formats) for label in labels}))


def with_loras(arithmetic: Mapping[str, str], loras: str = BESIDE) -> tuple[tuple[str, str], ...]:
    """The arithmetic of stored weights by label, and that of LoRAs on them, as `Numerics` has it."""
    return tuple(sorted({**arithmetic, LORA: loras}.items())) if arithmetic else ()


def labels_of(parameters: Iterable[ParameterSpec]) -> list[str]:
    """The labels of those that are stored in a format and not as their numbers, sorted."""
    return sorted({p.dtype for p in parameters if p.in_a_format})


def _first(label: str, dtype: torch.dtype, device: torch.device, formats: Mapping[str, WeightFormat]) -> str:
    found, kind = format_of(label, formats)
    possible = found.arithmetics(kind, dtype, device)
    if not possible:
        raise CheckpointUnrecognised(
            f"Weights stored as {label} cannot be computed with in {dtype} on {device}.",
            hint="dtype=torch.bfloat16, another device, or unquantised weights",
        )
    return possible[0]
