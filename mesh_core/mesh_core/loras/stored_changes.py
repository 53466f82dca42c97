"""What LoRAs do to weights that stay as they are stored: beside them, or on the numbers that they have for the moment.

Neither changes what is stored, so another strength is another number and nothing else, and nothing is left of a LoRA
that is taken off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from mesh_core.loras.merging import Entry, merge
from mesh_core.model.stored_weight import StoredWeight, numbers

WithTensors = tuple[Entry, Mapping[str, Tensor]]
"""A patch, and its tensors by role."""


@dataclass(frozen=True)
class _Product:
    """Rows ``start:stop`` of a weight change by ``scaling * up[first : first + stop - start] @ down``."""

    start: int
    stop: int
    first: int
    up: Tensor
    down: Tensor
    scaling: float

    def factors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``up`` [rows, rank] and ``down`` [rank, columns]."""
        up = self.up[self.first : self.first + self.stop - self.start]
        return up.flatten(1).to(device), self.down.flatten(1).to(device)


class Beside:
    """Products of two small matrices, added to what the layer gives: PEFT's arithmetic, types and order."""

    def __init__(self, products: Sequence[_Product]) -> None:
        self._products = tuple(products)

    def linear(self, x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
        """See `Change.linear`."""
        result = weight.linear(x, bias)
        dtype = result.dtype
        for product in self._products:
            up, down = product.factors(x.device)
            x = x.to(down.dtype)
            change = linear(linear(x, down), up) * product.scaling
            if change.shape == result.shape:
                result = result + change
            else:
                result = result.to(torch.promote_types(result.dtype, change.dtype))
                result[..., product.start : product.stop] += change
        return result.to(dtype)

    def numbers(self, weight: StoredWeight) -> Tensor:
        """See `Change.numbers`."""
        made = weight.dense().to(torch.float32)
        for product in self._products:
            up, down = (t.to(torch.float32) for t in product.factors(made.device))
            made[product.start : product.stop] += torch.mm(up, down) * product.scaling
        return made.to(weight.dtype)


class OnNumbers:
    """Patches merged into the numbers in float32, which are rounded once, whenever they are needed.

    Args:
        name: of the weight.
        group: the parameters that it is changed with.
        bases: those, untouched, by name; looked up when they are needed.
        patches: all of the group's, with tensors in their own types.
    """

    def __init__(
        self, name: str, group: frozenset[str], bases: Mapping[str, Tensor], patches: Sequence[WithTensors]
    ) -> None:
        self._name, self._others = name, group - {name}
        self._bases, self._patches = bases, tuple(patches)

    def linear(self, x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
        """See `Change.linear`."""
        return linear(x, self.numbers(weight).to(x.dtype), bias)

    def numbers(self, weight: StoredWeight) -> Tensor:
        """See `Change.numbers`."""
        weights = {self._name: weight.dense().to(torch.float32)}
        for other in self._others:
            weights[other] = numbers(self._bases[other]).to(weight.device, torch.float32)
        for (applied, patch), tensors in self._patches:
            merge(patch, tensors, applied, weights)
        return weights[self._name].to(weight.dtype)


def beside(name: str, loaded: Sequence[WithTensors]) -> Beside:
    """What patches of a parameter that are all products do to it.

    Args:
        loaded: with tensors in the type of the parameter's numbers.
    """
    return Beside([product for entry in loaded for product in _products(name, *entry)])


def _products(name: str, entry: Entry, tensors: Mapping[str, Tensor]) -> list[_Product]:
    applied, patch = entry
    up, down, found, first = tensors["up"], tensors["down"], [], 0
    scaling = applied.strength if patch.alpha is None else applied.strength * patch.alpha / down.shape[0]
    for rows in patch.target:
        if rows.parameter == name:
            found.append(_Product(rows.start, rows.stop, first, up, down, scaling))
        first += len(rows)
    return found
