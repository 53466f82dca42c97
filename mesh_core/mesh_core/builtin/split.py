"""The built-in ``mesh_propose_split``: as many blocks here as fit, the rest shared by the workers' free memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mesh_core.errors import PlanDoesNotFit
from mesh_core.hookspecs import hookimpl
from mesh_core.model.plan import HOST_INDEX, Hop, WorkerInfo
from mesh_core.model.sizes import divide, file_itemsize, fitting, span_bytes
from mesh_core.model.spans import BlockSpan
from mesh_core.system.config import in_bytes

if TYPE_CHECKING:
    from mesh_core.crossing.bandwidth import Link
    from mesh_core.model.spec import ModelSpec


class DefaultSplit:
    """Built-in ``mesh_propose_split``: fills the host first, then shares the rest by the workers' free memory."""

    @hookimpl(trylast=True)
    def mesh_propose_split(
        self, model: ModelSpec, workers: Sequence[WorkerInfo], links: Sequence[Link | None]
    ) -> Sequence[Hop] | None:
        host, others = workers[0], workers[1:]
        if not others:
            return [Hop(BlockSpan(0, model.blocks), HOST_INDEX)]
        itemsize = file_itemsize(model)
        local = fitting(model, host.free, itemsize) if host.free is not None else model.blocks // len(workers)
        rest = BlockSpan(local, model.blocks)
        spans = divide(model, rest, [float(w.free or 1) for w in others])
        if not all(_fits(model, span, w, itemsize) for span, w in zip(spans, others, strict=True)):
            spans = _packed(model, rest, others, itemsize)
        return [Hop(BlockSpan(0, local), HOST_INDEX), *(Hop(s, i + 1) for i, s in enumerate(spans))]


def _fits(model: ModelSpec, span: BlockSpan, worker: WorkerInfo, itemsize: int) -> bool:
    return worker.free is None or span_bytes(model, span, itemsize) <= worker.free


def _packed(model: ModelSpec, span: BlockSpan, workers: Sequence[WorkerInfo], itemsize: int) -> list[BlockSpan]:
    """``span`` over ``workers``, each with as many blocks as it holds: if any cut fits, this one does."""
    spans, start = [], span.start
    for worker in workers:
        stops = range(start, span.stop + 1)
        stop = max(s for s in stops if _fits(model, BlockSpan(start, s), worker, itemsize))
        spans.append(BlockSpan(start, stop))
        start = stop
    if start < span.stop:
        left = BlockSpan(start, span.stop)
        raise PlanDoesNotFit(
            f"Blocks {left} ({in_bytes(span_bytes(model, left, itemsize))}) fit neither on this machine nor on "
            f"{', '.join(w.name for w in workers)}.",
            hint="one more worker, or a larger --memory for one of them",
        )
    return spans
