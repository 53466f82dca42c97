"""A plan: which span of blocks runs where, made of what a user writes and checked against the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mesh_core.errors import PlanError
from mesh_core.model.sizes import divide
from mesh_core.model.spans import BlockSpan

if TYPE_CHECKING:
    from mesh_core.model.spec import ModelSpec

HOST_INDEX = 0
"""Index of the host among the workers of a plan."""


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
        """The host's span; may be empty."""
        return self.hops[0].span

    @property
    def remote(self) -> tuple[Hop, ...]:
        """The hops that are not empty and not the host's."""
        return tuple(h for h in self.hops[1:] if len(h.span))


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
        if (hop.worker == HOST_INDEX) != (i == 0) or not 0 <= hop.worker <= workers:
            raise PlanError(
                "The host runs the first span, and only that one.",
                hint="local=':4' (--local :4)",
            )
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
    hops = [Hop(model.span(local), HOST_INDEX)]
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
