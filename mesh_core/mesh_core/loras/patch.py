"""A patch: one change of some rows of a model's parameters. Knows no file, no naming, no family."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite
from typing import Any

from blake3 import blake3

from mesh_core.errors import LoraError, LoraUnmatched
from mesh_core.loras.algorithms import ALGORITHMS
from mesh_core.loras.tensors import Source
from mesh_core.model.spec import ModelSpec


@dataclass(frozen=True)
class Rows:
    """Rows ``start:stop`` of a parameter, along dimension 0."""

    parameter: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Patch:
    """One change of one weight.

    Attributes:
        algorithm: a key of `mesh_core.loras.algorithms.ALGORITHMS`.
        target: rows whose concatenation along dimension 0 is the weight that the patch was made for. A fused query,
            key and value is the rows of three parameters.
        tensors: by role, see `ALGORITHMS`.
        alpha: as the file says; None for no scaling. Its meaning is the algorithm's.
        narrow: (dim, start, size): only this part of the weight is patched.
    """

    algorithm: str
    target: tuple[Rows, ...]
    tensors: Mapping[str, Source]
    alpha: float | None = None
    narrow: tuple[int, int, int] | None = None

    @property
    def parameters(self) -> frozenset[str]:
        """Names of the parameters that it changes; more than one for fused weights."""
        return frozenset(rows.parameter for rows in self.target)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def facts(self) -> list[Any]:
        """All but the tensors, as plain values."""
        return [self.algorithm, [[r.parameter, r.start, r.stop] for r in self.target], self.alpha, self.narrow]

    @cached_property
    def outline(self) -> str:
        """Hash of all but the tensors' content. Costs no reading, so what differs in kind is told apart at once."""
        shapes = {role: [t.dtype, list(t.shape)] for role, t in sorted(self.tensors.items())}
        return blake3(json.dumps([self.facts(), shapes]).encode()).hexdigest()

    @cached_property
    def digest(self) -> str:
        """Hash of everything."""
        content = {role: t.digest() for role, t in sorted(self.tensors.items())}
        return blake3(json.dumps([self.outline, content]).encode()).hexdigest()

    def shape(self, spec: ModelSpec) -> tuple[int, ...]:
        """Of the weight that is patched, before ``narrow``."""
        rest = spec.parameters[self.target[0].parameter].shape[1:]
        return (sum(len(r) for r in self.target), *rest)

    def check(self, spec: ModelSpec) -> None:
        """Raises:
        LoraUnmatched: rows that the model does not have.
        LoraError: tensors that do not fit the algorithm, or the weight.
        """
        algorithm = ALGORITHMS.get(self.algorithm)
        if algorithm is None:
            raise LoraError(
                f"{str(self.algorithm)[:64]!r} is no known LoRA algorithm.", hint=f"one of {', '.join(ALGORITHMS)}"
            )
        if not self.target or not isfinite(self.alpha or 0.0):
            raise LoraError(f"A {self.algorithm} patch names no rows, or an alpha that is no number.")
        rests = set()
        for rows in self.target:
            parameter = spec.parameters.get(rows.parameter)
            if parameter is None or not 0 <= rows.start < rows.stop <= (parameter.shape or (1,))[0]:
                raise LoraUnmatched(
                    f"The {spec.family} model has no rows {rows.start}:{rows.stop} of {rows.parameter[:200]!r}.",
                    hint="a LoRA that was made for this model",
                )
            rests.add(parameter.shape[1:])
        where = self.target[0].parameter
        if len(rests) != 1:
            raise LoraError(f"A patch of {where} joins weights of different widths.")
        shape = self.shape(spec)
        if self.narrow is not None:
            dim, start, size = self.narrow
            if not (0 <= dim < len(shape) and start >= 0 and size > 0 and start + size <= shape[dim]):
                raise LoraError(f"A patch of {where} is for a part that the weight {shape} does not have.")
            shape = (*shape[:dim], size, *shape[dim + 1 :])
        shapes = {role: t.shape for role, t in self.tensors.items()}
        problem = algorithm.problem(shape, shapes)
        if problem:
            listed = ", ".join(f"{role} {list(s)}" for role, s in sorted(shapes.items()))
            raise LoraError(
                f"A {self.algorithm} patch does not fit {where}, which is {list(shape)}: {problem} ({listed[:400]}).",
                hint="a LoRA that was made for this model",
            )


def canonical(patch: Patch) -> Patch:
    """The same patch, written in the one way in which it is hashed."""
    rows: list[Rows] = []
    for r in patch.target:
        if rows and (rows[-1].parameter, rows[-1].stop) == (r.parameter, r.start):
            rows[-1] = Rows(r.parameter, rows[-1].start, r.stop)
        else:
            rows.append(r)
    target, narrow = tuple(rows), patch.narrow
    if narrow is not None and narrow[0] == 0:
        target, narrow = cut_rows(target, narrow[1], narrow[2]), None
    algorithm = ALGORITHMS.get(patch.algorithm)
    alpha = patch.alpha
    if alpha is not None and algorithm is not None and algorithm.rank_role in patch.tensors:
        shape = patch.tensors[algorithm.rank_role].shape
        if shape and alpha == shape[0]:
            alpha = None
    if patch.algorithm == "diff" and alpha == 1.0:
        alpha = None
    return replace(patch, target=target, alpha=alpha, narrow=narrow)


def cut_rows(target: Sequence[Rows], start: int, size: int) -> tuple[Rows, ...]:
    """Rows ``start:start + size`` of the concatenation of ``target``.

    Raises:
        LoraError: it has fewer.
    """
    found: list[Rows] = []
    position, stop = 0, start + size
    for rows in target:
        low, high = max(start, position), min(stop, position + len(rows))
        if low < high:
            found.append(Rows(rows.parameter, rows.start + low - position, rows.start + high - position))
        position += len(rows)
    if not 0 <= start < stop <= position:
        raise LoraError(f"A patch is for rows {start}:{stop} of a weight that has {position}.")
    return tuple(found)
