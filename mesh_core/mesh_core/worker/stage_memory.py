"""The memory that the stages of one device share, and how room is made in it.

Stages that nobody uses are evicted; what patched weights were made from is parked in host memory.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import count

import torch
from torch import nn

from mesh_core.errors import PlanDoesNotFit
from mesh_core.loras.apply import PatchedModel
from mesh_core.model.adapter import Stage
from mesh_core.model.library import Checkpoint
from mesh_core.model.pool import ParameterPool
from mesh_core.model.sizes import span_bytes
from mesh_core.model.spec import ModelSpec
from mesh_core.system.config import in_bytes
from mesh_core.worker.stage_table import StageKey, StageTable

_CPU = torch.device("cpu")


class StageMemory:
    """Parameters by model and name, shared by the stages that hold them; one load at a time makes room.

    Attributes:
        device: where stages compute.
        budget: bytes of weights that may be loaded at once.
        pool: every parameter that a stage holds.
    """

    def __init__(self, device: torch.device, budget: int, table: StageTable) -> None:
        self.device, self.budget = device, budget
        self.pool = ParameterPool()
        self._table = table
        self._merges = count()

    @property
    def nbytes(self) -> int:
        """Bytes of weights loaded now, patched ones and what they were made from included."""
        return self.pool.nbytes(self.device)

    def make_room(
        self, spec: ModelSpec, key: StageKey, patched: Collection[str] = (), keep: StageKey | None = None,
        has: Collection[str] = (),
    ) -> None:  # fmt: skip
        """Evict and park until the stage ``key`` fits.

        Args:
            patched: parameters that will be made from loaded ones.
            keep: a stage that stays.
            has: parameters that it has in a patched version, whatever became of the untouched one.

        Raises:
            PlanDoesNotFit: the stage is larger than the budget, or than what stages in use leave of it.
        """
        size = key.dtype.itemsize
        # On a GPU, what patched weights were made from moves to host memory when there is no room.
        twice = patched if self.device.type == "cpu" else ()
        extra = sum(p.elements * size for name, p in spec.parameters_of(key.span).items() if name in twice)
        needed = span_bytes(spec, key.span, size) + extra
        if needed > self.budget:
            raise PlanDoesNotFit(
                f"Blocks {key.span} need {in_bytes(needed)}, this worker offers {in_bytes(self.budget)}.",
                hint="fewer blocks for this worker, or a larger --memory",
            )
        # Eviction frees parameters that the new stage shares last, so look at what is truly left each time.
        while self._missing(spec, key, has) + extra + self.nbytes > self.budget:
            if not self._table.evict_for(key, keep) and not self._park():
                break
        held = self.nbytes
        if self._missing(spec, key, has) + extra + held > self.budget:
            raise PlanDoesNotFit(
                f"Blocks {key.span} need {in_bytes(needed)}; other sessions use {in_bytes(held)} of "
                f"{in_bytes(self.budget)}.",
                hint="the same later, fewer blocks, or a larger --memory",
            )

    def settle(self, key: StageKey) -> None:
        """After the LoRAs of the stage ``key`` changed: park what is over the budget.

        Raises:
            PlanDoesNotFit: that is not enough.
        """
        if self.nbytes > self.budget and not (self._park() and self.nbytes <= self.budget):
            raise PlanDoesNotFit(
                f"Blocks {key.span} with their LoRAs beside what other sessions share need {in_bytes(self.nbytes)} "
                f"of {in_bytes(self.budget)}.",
                hint="fewer blocks for this worker, or a larger --memory",
            )

    def patchable(self, checkpoint: Checkpoint, key: StageKey, stage: Stage) -> PatchedModel:
        """The stage's parameters as LoRAs change them, each counted, and shared again once it is untouched."""
        model = key.fingerprint

        def merged(patched: PatchedModel, name: str, parameter: nn.Parameter) -> None:
            self.pool.put((model, f"{name} merged {next(self._merges)}", self.device, key.dtype), parameter)
            if self.device.type != "cpu" and self.nbytes > self.budget:
                self.pool.put((model, name, _CPU, key.dtype), patched.park(name))

        def restored(name: str, base: nn.Parameter) -> nn.Parameter:
            place = (model, name, self.device, key.dtype)
            shared = self.pool.get(place)
            if shared is None:
                shared = nn.Parameter(base.data.to(self.device), requires_grad=False)
                self.pool.put(place, shared)
            return shared

        parameters = checkpoint.spec.parameters_of(key.span)
        return PatchedModel(stage.model, parameters, merged=merged, restored=restored)

    def _missing(self, spec: ModelSpec, key: StageKey, has: Collection[str]) -> int:
        """Bytes that the stage needs and nobody holds."""
        return sum(
            p.elements * key.dtype.itemsize
            for name, p in spec.parameters_of(key.span).items()
            if name not in has and self.pool.get((key.fingerprint, name, self.device, key.dtype)) is None
        )

    def _park(self) -> bool:
        """Move untouched versions of patched weights to host memory; whether there were any on a device."""
        moved = False
        for key, entry in self._table.items():
            for name, base in list(entry.patched.base.items()):
                if base.device.type != "cpu":
                    self.pool.put((key.fingerprint, name, _CPU, key.dtype), entry.patched.park(name))
                    moved = True
        return moved
