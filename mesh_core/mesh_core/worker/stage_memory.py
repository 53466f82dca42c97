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
from mesh_core.model.sizes import transient
from mesh_core.model.spec import ModelSpec
from mesh_core.model.weights import key_of, moved, pool_key
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
        parameters, numerics = spec.parameters_of(key.span), key.numerics
        # On a GPU, what patched weights were made from moves to host memory when there is no room.
        twice = patched if self.device.type == "cpu" else ()
        extra = transient(parameters)
        extra += sum(p.elements * numerics.dtype_of(n, p).itemsize for n, p in parameters.items() if n in twice)
        needed = sum(numerics.nbytes(name, p) for name, p in parameters.items()) + extra
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
        model, parameters = key.fingerprint, checkpoint.spec.parameters_of(key.span)

        def merged(patched: PatchedModel, name: str, parameter: nn.Parameter) -> None:
            self.pool.put(key_of(model, f"{name} merged {next(self._merges)}", parameter), parameter)
            if self.device.type != "cpu" and self.nbytes > self.budget:
                parked = patched.park(name)
                self.pool.put(key_of(model, name, parked), parked)

        def restored(name: str, base: nn.Parameter) -> nn.Parameter:
            here = self.pool.get(pool_key(model, name, parameters[name], self.device, key.numerics))
            shared = moved(base, self.device) if here is None else here
            self.pool.put(key_of(model, name, shared), shared)
            return shared

        return PatchedModel(stage.model, parameters, merged=merged, restored=restored)

    def _missing(self, spec: ModelSpec, key: StageKey, has: Collection[str]) -> int:
        """Bytes that the stage needs and nobody holds."""
        return sum(
            key.numerics.nbytes(name, p)
            for name, p in spec.parameters_of(key.span).items()
            if name not in has and self.pool.get(pool_key(key.fingerprint, name, p, self.device, key.numerics)) is None
        )

    def _park(self) -> bool:
        """Move untouched versions of patched weights to host memory; whether there were any on a device."""
        any_moved = False
        for key, entry in self._table.items():
            for name, base in list(entry.patched.base.items()):
                if base.device.type != "cpu":
                    parked = entry.patched.park(name)
                    self.pool.put(key_of(key.fingerprint, name, parked), parked)
                    any_moved = True
        return any_moved
