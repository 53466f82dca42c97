"""A plan: which span of blocks runs where. Turns what a user writes into one, and proposes one where they do not.

Bytes are those of the weights in the dtype that stages compute in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mesh_core.errors import PlanError
from mesh_core.model.spans import BlockSpan

if TYPE_CHECKING:
    from mesh_core.model.spec import ModelSpec

HOST = 0
"""Index of the host among the workers of a plan."""

RESERVE = 2 << 30
"""Bytes of a device that a proposed cut leaves to activations, text encoder and autoencoder."""


@dataclass(frozen=True)
class WorkerInfo:
    """A place that can run a span. ``free``: bytes that it offers; None when it does not say."""

    name: str
    free: int | None = None


@dataclass(frozen=True)
class Hop:
    """A span on a worker; ``worker`` is an index, 0 is the host."""

    span: BlockSpan
    worker: int


@dataclass(frozen=True)
class Plan:
    """Hops in execution order, the host's span first (possibly empty), covering the model without gaps."""

    hops: tuple[Hop, ...]

    @property
    def local(self) -> BlockSpan:
        return self.hops[0].span

    @property
    def remote(self) -> tuple[Hop, ...]:
        """The hops that are not empty and not the host's."""
        return tuple(h for h in self.hops[1:] if len(h.span))


def span_bytes(model: ModelSpec, span: BlockSpan, itemsize: int = 2) -> int:
    """Bytes of weights that a stage of ``span`` holds."""
    return sum(p.elements for p in model.parameters_of(span).values()) * itemsize


def file_itemsize(model: ModelSpec) -> int:
    """Bytes per weight in the checkpoint, the widest type of it: what a stage needs unless it is told to cast."""
    from mesh_codec.dtypes import from_safetensors

    return max(from_safetensors(dtype).itemsize for dtype in model.dtypes)


def check(model: ModelSpec, hops: Sequence[Hop], workers: int) -> Plan:
    """``hops`` as a plan of ``model``.

    Raises:
        PlanError: a gap, an overlap, an unknown worker, or a host span that is not at the start.
    """
    position = 0
    for i, hop in enumerate(hops):
        if hop.span.start != position:
            raise PlanError(
                f"The spans must follow each other without gaps: block {position} is expected next, "
                f"{hop.span} starts at {hop.span.start}.",
                hint="spans such as :4, 4:8 and 8:",
            )
        if (hop.worker == HOST) != (i == 0) or not 0 <= hop.worker <= workers:
            raise PlanError("The host runs the first span, and only that one.", hint="local=':4'")
        position = hop.span.stop
    if position != model.blocks:
        raise PlanError(
            f"Blocks {position}:{model.blocks} run nowhere.",
            hint="one more worker, or a span that runs to the end, for example '4:'",
        )
    return Plan(tuple(hops))


def make(model: ModelSpec, local: str, spans: Sequence[str | None]) -> Plan:
    """The plan for a host span and one span per worker; spans that are None share what is left evenly, by bytes.

    Raises:
        PlanError: see `check`.
    """
    hops = [Hop(model.span(local), HOST)]
    given = [None if text is None else model.span(text) for text in spans]
    for i, span in enumerate(given):
        start = hops[-1].span.stop
        if span is None:
            following = given[i + 1 :]
            known = next((k for k, s in enumerate(following) if s is not None), len(following))
            stop = following[known].start if known < len(following) else model.blocks  # type: ignore[union-attr]
            shares = divide(model, BlockSpan(min(start, stop), stop), [1.0] * (known + 1))
            span = shares[0]
        hops.append(Hop(span, i + 1))
    return check(model, hops, len(spans))


def divide(model: ModelSpec, span: BlockSpan, weights: Sequence[float]) -> list[BlockSpan]:
    """``span`` cut into ``len(weights)`` spans whose bytes are as near to those proportions as blocks allow."""
    sizes = [span_bytes(model, BlockSpan(i, i + 1)) for i in range(span.start, span.stop)]
    total, shares, start = sum(sizes), [], span.start
    filled, wanted = 0.0, 0.0
    for weight in weights[:-1]:
        wanted += total * weight / (sum(weights) or 1)
        stop = start
        while stop < span.stop and filled + sizes[stop - span.start] / 2 <= wanted:
            filled += sizes[stop - span.start]
            stop += 1
        shares.append(BlockSpan(start, stop))
        start = stop
    return [*shares, BlockSpan(start, span.stop)]


def fitting(model: ModelSpec, memory: int, itemsize: int = 2, reserve: int = RESERVE) -> int:
    """The largest k for which blocks ``:k`` fit into ``memory`` bytes beside ``reserve``; 0 if none does."""
    fits = [k for k in range(model.blocks + 1) if span_bytes(model, BlockSpan(0, k), itemsize) + reserve <= memory]
    return max(fits, default=0)
