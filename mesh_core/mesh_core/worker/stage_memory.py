"""The memory that the stages of one device share, and how room is made in it.

Stages that nobody uses are evicted; what patched weights were made from is parked in host memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import count

import torch
from torch import nn

from mesh_core.errors import PlanDoesNotFit
from mesh_core.loras.apply import PatchedModel
from mesh_core.loras.device_tensors import Held, bytes_of, key_on
from mesh_core.loras.lora import Applied
from mesh_core.loras.work import Group, held_beside, transient_of, work_of
from mesh_core.model.adapter import Stage
from mesh_core.model.library import Checkpoint
from mesh_core.model.numerics import Numerics
from mesh_core.model.pool import ParameterPool, PoolKey
from mesh_core.model.sizes import transient
from mesh_core.model.spec import ModelSpec, ParameterSpec
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
        self, spec: ModelSpec, key: StageKey, loras: Sequence[Applied] = (), keep: StageKey | None = None,
        has: Collection[str] = (),
    ) -> None:  # fmt: skip
        """Evict and park until the stage ``key`` fits.

        Args:
            loras: those that it will have. Parameters that they are merged into are made from loaded ones; beside those
                that stay as they are stored, the LoRAs' own tensors are held.
            keep: a stage that stays.
            has: parameters that it has in a patched version, whatever became of the untouched one.

        Raises:
            PlanDoesNotFit: the stage is larger than the budget, or than what stages in use leave of it.
            LoraError: see `work_of`.
        """
        parameters, numerics = spec.parameters_of(key.span), key.numerics
        work = work_of(loras, frozenset(parameters))
        beside = self._beside(work, parameters, numerics)
        extra = max(transient(parameters), transient_of(work, parameters, beside=numerics.loras_beside))
        if self.device.type == "cpu":
            # On a GPU, what weights were merged from moves to host memory when there is no room.
            twice = {name for group in work for name in group.parameters if name not in has}
            extra += sum(numerics.nbytes(n, parameters[n]) for n in twice if parameters[n].stored_bytes is None)
        needed = sum(numerics.nbytes(name, p) for name, p in parameters.items()) + extra
        needed += sum(bytes_of(held) for held in beside.values())
        if needed > self.budget:
            raise PlanDoesNotFit(
                f"Blocks {key.span} need {in_bytes(needed)}, this worker offers {in_bytes(self.budget)}.",
                hint="fewer blocks for this worker, or a larger --memory",
            )
        # Eviction frees parameters that the new stage shares last, so look at what is truly left each time.
        while self._missing(spec, key, has, beside) + extra + self.nbytes > self.budget:
            if not self._table.evict_for(key, keep) and not self._park():
                break
        held = self.nbytes
        if self._missing(spec, key, has, beside) + extra + held > self.budget:
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

        beside = key.numerics.loras_beside
        return PatchedModel(stage.model, parameters, beside=beside, pool=self.pool, merged=merged, restored=restored)

    def _beside(
        self, work: Sequence[Group], parameters: Mapping[str, ParameterSpec], numerics: Numerics
    ) -> dict[PoolKey, Held]:
        """The tensors of LoRAs that have to be here, by what they are shared under."""
        stored = {n: numerics.dtype_of(n, p) for n, p in parameters.items() if p.stored_bytes is not None}
        wanted = held_beside(work, stored, beside=numerics.loras_beside)
        return {key_on(self.device, held): held for held in wanted}

    def _missing(self, spec: ModelSpec, key: StageKey, has: Collection[str], beside: Mapping[PoolKey, Held]) -> int:
        """Bytes that the stage needs and nobody holds."""
        loras = sum(bytes_of(held) for shared, held in beside.items() if self.pool.get(shared) is None)
        return loras + sum(
            key.numerics.nbytes(name, p)
            for name, p in spec.parameters_of(key.span).items()
            if name not in has and self.pool.get(pool_key(key.fingerprint, name, p, self.device, key.numerics)) is None
        )

    def _park(self) -> bool:
        """Move untouched versions of patched weights to host memory; whether there were any on a device."""
        any_moved = False
        for key, entry in self._table.items():
            for name in entry.patched.merged_on_device:
                parked = entry.patched.park(name)
                self.pool.put(key_of(key.fingerprint, name, parked), parked)
                any_moved = True
        return any_moved
