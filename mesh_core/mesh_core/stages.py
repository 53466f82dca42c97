"""The stages of a process: loaded once, shared by the sessions that ask for the same, evicted by a memory budget.

Stages of one model that overlap share their parameters, so a changed span loads or frees only the difference.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

import torch

from mesh_core.adapter import Stage
from mesh_core.checkpoint import Progress
from mesh_core.errors import PlanDoesNotFit
from mesh_core.library import Checkpoint
from mesh_core.plan import span_bytes
from mesh_core.spans import BlockSpan
from mesh_core.weights import ParameterPool, WeightReader


@dataclass(frozen=True)
class StageKey:
    """What makes two stages the same stage."""

    fingerprint: str
    span: BlockSpan
    dtype: torch.dtype
    loras: tuple[str, ...] = ()


@dataclass
class _Entry:
    stage: Stage
    users: int = 0
    last_used: float = field(default_factory=monotonic)


@dataclass(frozen=True)
class Loaded:
    """A stage in use, and what getting it cost. ``bytes_read``: from disk; 0 when it was shared."""

    key: StageKey
    stage: Stage
    bytes_read: int
    seconds: float


class StageStore:
    """Stages on one device. `acquire` may run in several threads; loads happen one at a time.

    Args:
        device: where the stages live.
        budget: bytes of weights that may be loaded at once.
        before_block: called before every block of every stage; may raise to stop the work.
    """

    def __init__(self, device: torch.device, budget: int, before_block: Callable[[], None] | None = None) -> None:
        self.device, self.budget = device, budget
        self._before_block = before_block
        self._pool = ParameterPool()
        self._entries: dict[StageKey, _Entry] = {}
        self._loading = threading.Lock()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of weights loaded now."""
        return self._pool.nbytes(self.device)

    def acquire(self, checkpoint: Checkpoint, key: StageKey, progress: Progress | None = None) -> Loaded:
        """The stage ``key`` of ``checkpoint``, loaded if it is not here. Give it back with `release`.

        Raises:
            PlanDoesNotFit: the stage is larger than the budget, or than what sessions in use leave of it.
            CheckpointError: see `WeightReader.fill`.
        """
        started = monotonic()
        with self._loading:
            entry = self._use(key)
            if entry is not None:
                return Loaded(key, entry.stage, 0, monotonic() - started)
            self._make_room(checkpoint, key)
            reader = WeightReader(checkpoint.header, model=key.fingerprint, pool=self._pool, progress=progress)
            stage = checkpoint.adapter.build_stage(
                checkpoint.spec, key.span, reader, device=self.device, dtype=key.dtype
            )
            self._watch(stage)
            with self._lock:
                self._entries[key] = _Entry(stage, users=1)
            return Loaded(key, stage, reader.bytes_read, monotonic() - started)

    def release(self, key: StageKey) -> None:
        """The caller no longer uses the stage. It stays loaded while the budget allows."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                entry.users = max(entry.users - 1, 0)
                entry.last_used = monotonic()

    def clear(self) -> None:
        """Free every stage that nobody uses."""
        with self._lock:
            self._entries = {k: e for k, e in self._entries.items() if e.users}

    def _use(self, key: StageKey) -> _Entry | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                entry.users += 1
                entry.last_used = monotonic()
            return entry

    def _make_room(self, checkpoint: Checkpoint, key: StageKey) -> None:
        needed = span_bytes(checkpoint.spec, key.span, key.dtype.itemsize)
        if needed > self.budget:
            raise PlanDoesNotFit(
                f"Blocks {key.span} need {needed / 1e9:.2f} GB, this worker offers {self.budget / 1e9:.2f} GB.",
                hint="fewer blocks for this worker, or a larger --memory",
            )
        # Eviction frees parameters that the new stage shares last, so look at what is truly left each time.
        while self._missing(checkpoint, key) + self.nbytes > self.budget:
            with self._lock:
                idle = [
                    (k.fingerprint == key.fingerprint, e.last_used, k) for k, e in self._entries.items() if not e.users
                ]
                if not idle:
                    break
                del self._entries[min(idle, key=lambda item: item[:2])[2]]
        held = self.nbytes
        if self._missing(checkpoint, key) + held > self.budget:
            raise PlanDoesNotFit(
                f"Blocks {key.span} need {needed / 1e9:.2f} GB; other sessions use {held / 1e9:.2f} GB of "
                f"{self.budget / 1e9:.2f} GB.",
                hint="the same later, fewer blocks, or a larger --memory",
            )

    def _missing(self, checkpoint: Checkpoint, key: StageKey) -> int:
        wanted = checkpoint.spec.parameters_of(key.span)
        return sum(
            p.elements * key.dtype.itemsize
            for name, p in wanted.items()
            if self._pool.get((key.fingerprint, name, self.device, key.dtype)) is None
        )

    def _watch(self, stage: Stage) -> None:
        if self._before_block is not None:
            check = self._before_block
            for block in stage.block_modules():
                block.register_forward_pre_hook(lambda *_: check())
