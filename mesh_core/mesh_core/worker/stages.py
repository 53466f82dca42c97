"""The stages of a process: loaded once, shared by the sessions that ask for the same, evicted by a memory budget.

Stages of one model that overlap share their parameters, so a changed span loads or frees only the difference.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic

import torch

from mesh_core.errors import PlanDoesNotFit
from mesh_core.loras.lora import Applied, set_key
from mesh_core.model.adapter import Stage
from mesh_core.model.checkpoint import ReadingProgress
from mesh_core.model.library import Checkpoint
from mesh_core.model.weights import WeightReader
from mesh_core.worker.stage_memory import StageMemory
from mesh_core.worker.stage_table import StageEntry, StageKey, StageTable


@dataclass(frozen=True)
class Loaded:
    """A stage in use, and what getting it cost.

    Attributes:
        bytes_read: from disk; 0 when it was shared.
        token: stands for this use of the stage, whatever others make of it.
    """

    key: StageKey
    stage: Stage
    bytes_read: int
    seconds: float
    token: object


class StageStore:
    """Stages on one device. `acquire` may run in several threads; loads happen one at a time.

    Args:
        device: where the stages live.
        budget: bytes of weights that may be loaded at once.
        before_layer: called before every block of every stage and every layer in it; may raise to stop the work.
    """

    def __init__(self, device: torch.device, budget: int, before_layer: Callable[[], None] | None = None) -> None:
        self.table = StageTable()
        self.memory = StageMemory(device, budget, self.table)
        self._before_layer = before_layer
        self._loading = threading.Lock()

    @property
    def nbytes(self) -> int:
        """See `StageMemory.nbytes`."""
        return self.memory.nbytes

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
        started, token = monotonic(), object()
        with self._loading:
            entry = self.table.use(key, token)
            if entry is not None:
                return Loaded(key, entry.stage, 0, monotonic() - started, token)
            self.memory.make_room(checkpoint.spec, key, loras)
            reader = WeightReader(checkpoint.header, model=key.fingerprint, pool=self.memory.pool, progress=progress)
            stage = checkpoint.adapter.build_stage(
                checkpoint.spec, key.span, reader, device=self.memory.device, numerics=key.numerics
            )
            self._watch(stage)
            entry = StageEntry(stage, self.memory.patchable(checkpoint, key, stage), users={token})
            self.table.put(key, entry)
            try:
                self._merge(key, entry, loras)
            except BaseException:
                self.table.remove(key)
                raise
            return Loaded(key, stage, reader.bytes_read, monotonic() - started, token)

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
            entry = self.table.used_alone(loaded.key, loaded.token, key)
            if entry is not None:
                self._change(checkpoint, loaded.key, key, entry, loras)
                return Loaded(key, entry.stage, 0, monotonic() - started, loaded.token)
        found = self.acquire(checkpoint, key, loras=loras)
        self.release(loaded)
        return found

    def release(self, loaded: Loaded) -> None:
        """The caller no longer uses the stage, which stays loaded while the budget allows. May be called twice."""
        self.table.release(loaded.token)

    def clear(self) -> None:
        """Free every stage that nobody uses."""
        self.table.evict_idle()

    def _change(
        self, checkpoint: Checkpoint, before: StageKey, after: StageKey, entry: StageEntry, loras: Sequence[Applied]
    ) -> None:
        """Give a stage other LoRAs in place; it is as it was when that fails."""
        spec, has, earlier = checkpoint.spec, entry.patched.base.keys(), entry.loras
        full = False
        try:
            self.memory.make_room(spec, after, loras, keep=before, has=has)
        except PlanDoesNotFit:
            full = True
            if not entry.patched.holds_tensors:
                raise
        try:
            if full:
                # The LoRAs that it has take room themselves.
                entry.patched.apply(())
                self.memory.make_room(spec, after, loras, keep=before)
            self._merge(after, entry, loras)
        except BaseException:
            self._merge(before, entry, earlier)
            raise
        self.table.rename(before, after)

    def _merge(self, key: StageKey, entry: StageEntry, loras: Sequence[Applied]) -> None:
        entry.patched.apply(loras)
        entry.loras = tuple(loras)
        self.memory.settle(key)

    def _watch(self, stage: Stage) -> None:
        """Look before every layer: of many tokens, a block takes minutes."""
        if self._before_layer is not None:
            check = self._before_layer
            for block in stage.block_modules():
                for module in block.modules():
                    if module is block or any(p.ndim > 1 for p in module.parameters(recurse=False)):
                        module.register_forward_pre_hook(lambda *_: check())
