"""The stages of a process: loaded once, shared by the sessions that ask for the same, evicted by a memory budget.

Stages of one model that overlap share their parameters, so a changed span loads or frees only the difference.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from time import monotonic

import torch
from torch import nn

from mesh_core.errors import PlanDoesNotFit
from mesh_core.loras.apply import PatchedModel
from mesh_core.loras.lora import Applied, set_key
from mesh_core.model.adapter import Stage
from mesh_core.model.checkpoint import ReadingProgress
from mesh_core.model.library import Checkpoint
from mesh_core.model.pool import ParameterPool
from mesh_core.model.sizes import span_bytes
from mesh_core.model.spans import BlockSpan
from mesh_core.model.weights import WeightReader


@dataclass(frozen=True)
class StageKey:
    """What makes two stages the same stage. ``loras``: see `mesh_core.loras.lora.set_key`."""

    fingerprint: str
    span: BlockSpan
    dtype: torch.dtype
    loras: tuple[tuple[str, float, float], ...] = ()


@dataclass
class _Entry:
    stage: Stage
    patched: PatchedModel
    loras: tuple[Applied, ...] = ()
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
        self._merges = count()

    @property
    def nbytes(self) -> int:
        """Bytes of weights loaded now, patched ones and what they were made from included."""
        return self._pool.nbytes(self.device)

    def acquire(
        self,
        checkpoint: Checkpoint,
        key: StageKey,
        progress: ReadingProgress | None = None,
        loras: Sequence[Applied] = (),
    ) -> Loaded:
        """The stage ``key`` of ``checkpoint``, loaded if it is not here. Give it back with `release`.

        Args:
            loras: those that ``key`` names.

        Raises:
            PlanDoesNotFit: the stage is larger than the budget, or than what sessions in use leave of it.
            CheckpointError: see `WeightReader.fill`.
            LoraError: see `PatchedModel.apply`.
        """
        started = monotonic()
        with self._loading:
            entry = self._use(key)
            if entry is not None:
                return Loaded(key, entry.stage, 0, monotonic() - started)
            self._make_room(checkpoint, key, _patched(loras))
            reader = WeightReader(checkpoint.header, model=key.fingerprint, pool=self._pool, progress=progress)
            stage = checkpoint.adapter.build_stage(
                checkpoint.spec, key.span, reader, device=self.device, dtype=key.dtype
            )
            self._watch(stage)
            entry = _Entry(stage, self._patchable(checkpoint, key, stage), users=1)
            with self._lock:
                self._entries[key] = entry
            try:
                self._merge(key, entry, loras)
            except BaseException:
                with self._lock:
                    del self._entries[key]
                raise
            return Loaded(key, stage, reader.bytes_read, monotonic() - started)

    def adjust(self, checkpoint: Checkpoint, loaded: Loaded, loras: Sequence[Applied]) -> Loaded:
        """A stage in use, with ``loras`` instead of those that it has; it is given back, the result is in use.

        A stage that nobody else uses is changed in place, from its base in memory. The caller makes sure that it is
        not computing.

        Raises:
            PlanDoesNotFit, LoraError: as for `acquire`; the stage is what it was.
        """
        started, key = monotonic(), replace(loaded.key, loras=set_key(loras))
        with self._loading:
            if key == loaded.key:
                return loaded
            with self._lock:
                entry = self._entries.get(loaded.key)
                alone = entry is not None and entry.users == 1 and key not in self._entries
            if entry is not None and alone:
                has = entry.patched.base.keys()
                self._make_room(checkpoint, key, _patched(loras) - has, keep=loaded.key, has=has)
                before = entry.loras
                try:
                    self._merge(key, entry, loras)
                except BaseException:
                    self._merge(loaded.key, entry, before)
                    raise
                with self._lock:
                    del self._entries[loaded.key]
                    self._entries[key] = entry
                return Loaded(key, entry.stage, 0, monotonic() - started)
        found = self.acquire(checkpoint, key, loras=loras)
        self.release(loaded.key)
        return found

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

    def _make_room(
        self, checkpoint: Checkpoint, key: StageKey, patched: Collection[str] = (), keep: StageKey | None = None,
        has: Collection[str] = (),
    ) -> None:  # fmt: skip
        """``patched`` will be made from what is loaded; the stage ``keep`` stays; ``has``: parameters that it has in
        a patched version, whatever became of the untouched one."""
        size = key.dtype.itemsize
        wanted = checkpoint.spec.parameters_of(key.span)
        # On a GPU, what patched weights were made from moves to host memory when there is no room.
        twice = patched if self.device.type == "cpu" else ()
        extra = sum(p.elements * size for name, p in wanted.items() if name in twice)
        needed = span_bytes(checkpoint.spec, key.span, size) + extra
        if needed > self.budget:
            raise PlanDoesNotFit(
                f"Blocks {key.span} need {needed / 1e9:.2f} GB, this worker offers {self.budget / 1e9:.2f} GB.",
                hint="fewer blocks for this worker, or a larger --memory",
            )
        # Eviction frees parameters that the new stage shares last, so look at what is truly left each time.
        while self._missing(checkpoint, key, has) + extra + self.nbytes > self.budget:
            if not self._evict(key, keep) and not self._park():
                break
        held = self.nbytes
        if self._missing(checkpoint, key, has) + extra + held > self.budget:
            raise PlanDoesNotFit(
                f"Blocks {key.span} need {needed / 1e9:.2f} GB; other sessions use {held / 1e9:.2f} GB of "
                f"{self.budget / 1e9:.2f} GB.",
                hint="the same later, fewer blocks, or a larger --memory",
            )

    def _evict(self, key: StageKey, keep: StageKey | None) -> bool:
        """Free the idle stage that ``key`` shares least with and that was idle for longest, if there is one."""
        with self._lock:
            idle = [
                (k.fingerprint == key.fingerprint, e.last_used, k)
                for k, e in self._entries.items()
                if not e.users and k != keep
            ]
            if idle:
                del self._entries[min(idle, key=lambda item: item[:2])[2]]
            return bool(idle)

    def _park(self) -> bool:
        """Move untouched versions of patched weights to host memory; whether there were any on a device."""
        with self._lock:
            entries = list(self._entries.items())
        moved = False
        for key, entry in entries:
            for name, base in list(entry.patched.base.items()):
                if base.device.type != "cpu":
                    self._pool.put((key.fingerprint, name, torch.device("cpu"), key.dtype), entry.patched.park(name))
                    moved = True
        return moved

    def _missing(self, checkpoint: Checkpoint, key: StageKey, has: Collection[str]) -> int:
        wanted = checkpoint.spec.parameters_of(key.span)
        return sum(
            p.elements * key.dtype.itemsize
            for name, p in wanted.items()
            if name not in has and self._pool.get((key.fingerprint, name, self.device, key.dtype)) is None
        )

    def _patchable(self, checkpoint: Checkpoint, key: StageKey, stage: Stage) -> PatchedModel:
        """The stage's parameters as LoRAs change them, each counted, and shared again once it is untouched."""
        model = key.fingerprint

        def merged(patched: PatchedModel, name: str, parameter: nn.Parameter) -> None:
            self._pool.put((model, f"{name} merged {next(self._merges)}", self.device, key.dtype), parameter)
            if self.device.type != "cpu" and self.nbytes > self.budget:
                self._pool.put((model, name, torch.device("cpu"), key.dtype), patched.park(name))

        def restored(name: str, base: nn.Parameter) -> nn.Parameter:
            place = (model, name, self.device, key.dtype)
            shared = self._pool.get(place)
            if shared is None:
                shared = nn.Parameter(base.data.to(self.device), requires_grad=False)
                self._pool.put(place, shared)
            return shared

        parameters = checkpoint.spec.parameters_of(key.span)
        return PatchedModel(stage.model, parameters, merged=merged, restored=restored)

    def _merge(self, key: StageKey, entry: _Entry, loras: Sequence[Applied]) -> None:
        entry.patched.apply(loras)
        entry.loras = tuple(loras)
        if self.nbytes > self.budget and not (self._park() and self.nbytes <= self.budget):
            raise PlanDoesNotFit(
                f"Blocks {key.span} with their LoRAs beside what other sessions share need {self.nbytes / 1e9:.2f} GB "
                f"of {self.budget / 1e9:.2f} GB.",
                hint="fewer blocks for this worker, or a larger --memory",
            )

    def _watch(self, stage: Stage) -> None:
        if self._before_block is not None:
            check = self._before_block
            for block in stage.block_modules():
                block.register_forward_pre_hook(lambda *_: check())


def _patched(loras: Sequence[Applied]) -> set[str]:
    return {name for applied in loras for patch in applied.lora.patches for name in patch.parameters}
