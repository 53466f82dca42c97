"""A model whose first span runs here and whose others run on workers: forward() arguments in, tensors out.

Used by every host program; knows no diffusers and no ComfyUI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from mesh_core.crossing.stats import RunStats
from mesh_core.errors import ConfigError, LoraMissing, PlanError
from mesh_core.host.loras import AnyLora
from mesh_core.host.options import ModelIdentity, SessionOptions
from mesh_core.host.progress import ProgressReport
from mesh_core.host.remote import Remote
from mesh_core.host.session import Session
from mesh_core.loras.apply import PatchedModel
from mesh_core.loras.lora import Applied
from mesh_core.model.adapter import Stage
from mesh_core.model.library import Checkpoint
from mesh_core.model.numerics import Numerics
from mesh_core.model.plan import Plan, WorkerInfo, check, make
from mesh_core.model.spec import Conditioning, ModelSpec, State
from mesh_core.plugins.registry import Plugins
from mesh_core.system.device import synchronise
from mesh_core.transport.base import Address

Workers = str | Sequence[str | tuple[str, str]]
"""One address, or several in execution order; (address, span) where the user says what a worker runs."""


@dataclass
class SplitRunner:
    """``local`` runs the plan's first span; ``session`` the rest, None when nothing is remote.

    Attributes:
        numerics: in which ``local`` computes; by default those of the session.
    """

    checkpoint: Checkpoint
    plan: Plan
    local: Stage
    session: Session | None
    numerics: Numerics | None = None
    _patched: PatchedModel | None = None

    @property
    def stats(self) -> RunStats:
        """Of the session; empty where all blocks run here."""
        return self.session.stats if self.session is not None else RunStats()

    def __call__(
        self, inputs: Mapping[str, Any], sequence: str = "", options: Mapping[str, Any] | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """One forward pass.

        Args:
            inputs: arguments of the model class's forward, by name.
            sequence: names one of several interleaved runs.
            options: go to the workers with those that the adapter makes of ``inputs``.

        Raises:
            UnsupportedInput: an argument that cannot cross a cut.
            MeshError: see `Session.run`.
        """
        adapter, spec = self.checkpoint.adapter, self.checkpoint.spec
        state, conditioning = adapter.begin(spec, inputs)
        conditioning = Conditioning(conditioning.constants, {**conditioning.options, **(options or {})})
        began = perf_counter()
        state = self._run_local(state, conditioning)
        local_ms = (perf_counter() - began) * 1e3
        if self.session is not None:
            state = self.session.run(state, conditioning, sequence=sequence, local_ms=local_ms)
        return adapter.finish(spec, state)

    def set_loras(self, loras: Sequence[AnyLora]) -> None:
        """Run all blocks, here and remote, with exactly ``loras`` from the next step on.

        Raises:
            LoraMissing: one that only the workers have is asked for, and blocks run here.
            MeshError: see `Session.set_loras`; no block has any LoRA then, and the next call starts afresh.
        """
        here = [lora for lora in loras if isinstance(lora, Applied)]
        if len(self.plan.local) and len(here) < len(loras):
            name = next(lora.name for lora in loras if not isinstance(lora, Applied))
            raise LoraMissing(
                f"The LoRA {name!r} is no file here, and blocks {self.plan.local} run on this machine.",
                hint="the path of a copy on this machine, or no blocks here: local=':0' (--local :0)",
            )
        if self._patched is None:
            parameters = self.checkpoint.spec.parameters_of(self.plan.local)
            numerics = self.numerics or (self.session.options.numerics if self.session is not None else None)
            beside = numerics is None or numerics.loras_beside
            self._patched = PatchedModel(self.local.model, parameters, beside=beside)
        try:
            if self.session is not None:
                self.session.set_loras(loras)
            self._patched.apply(here)
        except BaseException:
            self._patched.apply(())
            if self.session is not None:
                self.session.set_loras(())
            raise

    def restore_local(self) -> None:
        """Take the LoRAs off this machine's blocks, before they are moved or given to another runner."""
        if self._patched is not None:
            self._patched.apply(())

    @property
    def untouched(self) -> Mapping[str, Tensor]:
        """The local parameters that LoRAs changed, as they were, by name."""
        return self._patched.base if self._patched is not None else {}

    def _run_local(self, state: State, conditioning: Conditioning) -> State:
        if not len(self.plan.local):
            return state
        with torch.no_grad():
            state = self.local.forward(state, conditioning)
        if self.session is not None:
            synchronise(self.session.options.device)
        return state

    def close(self) -> None:
        """Let the workers forget the session. May be called twice."""
        if self.session is not None:
            self.session.close()


@dataclass(frozen=True)
class Placement:
    """A plan, and the workers that its remote hops run on, in their order."""

    plan: Plan
    remotes: tuple[Remote, ...]

    def close(self) -> None:
        """Hang up on the workers. May be called twice."""
        for remote in self.remotes:
            remote.close()


def place(
    checkpoint: Checkpoint,
    local: str | None,
    workers: Workers,
    plugins: Plugins,
    options: SessionOptions,
    free: int | None,
) -> Placement:
    """Connect to the workers and decide which span runs where.

    Args:
        local: the host's span; None: what is before the first worker's span, or where no spans are named, the whole
            cut as ``mesh_propose_split`` says.
        free: bytes that the host's device offers; None when it does not say.

    Raises:
        ConfigError: what is among ``workers`` is no address.
        TransportError: a worker cannot be reached, or does not know us.
        PlanError: spans that do not fit together.
    """
    spec = checkpoint.spec
    pairs = list(_pairs(workers))
    if local is None and any(span is not None for _, span in pairs):
        local = _before(spec, pairs[0][1])
    if local is not None:
        make(spec, local, [span for _, span in pairs])
    remotes = [Remote(Address(text), plugins, options.settings) for text, _ in pairs]
    try:
        for remote in remotes:
            remote.connect()
        if local is not None:
            plan = make(spec, local, [span for _, span in pairs])
        else:
            infos = [WorkerInfo("host", free), *(WorkerInfo(r.name, _offered(r)) for r in remotes)]
            links = [None, *(remote.measured()[0] for remote in remotes)]
            hops = plugins.hook.mesh_propose_split(model=spec, workers=infos, links=links)
            plan = check(spec, hops, len(remotes))
    except BaseException:
        for remote in remotes:
            remote.close()
        raise
    used = [remotes[hop.worker - 1] for hop in plan.remote]
    for remote in remotes:
        if remote not in used:
            remote.close()
    return Placement(plan, tuple(used))


def _pairs(workers: Workers) -> Iterator[tuple[str, str | None]]:
    for worker in [workers] if isinstance(workers, str) else workers:
        match worker:
            case str():
                yield worker, None
            case (str() as address, str() | None as span):
                yield address, span
            case _:
                raise ConfigError(
                    f"{str(worker)[:200]!r} among workers is neither an address nor an address with a span.",
                    hint="workers=['mesh://host:7777'], or [('mesh://host:7777', '12:20')]",
                )


def _before(spec: ModelSpec, first: str | None) -> str:
    """The host's span when only the first worker's is named."""
    if first is None:
        raise PlanError(
            "Where the host's blocks end cannot be told from a later worker's span.", hint="local=':4' (--local :4)"
        )
    return f":{spec.span(first).start}"


def _offered(remote: Remote) -> int | None:
    budgets = [d["budget"] for d in remote.welcome.devices if isinstance(d.get("budget"), int)]
    return sum(budgets) if budgets else None


def open_session(
    identity: Callable[[], ModelIdentity],
    placement: Placement,
    options: SessionOptions,
    plugins: Plugins,
    report: ProgressReport | None,
) -> Session | None:
    """The session for the remote hops of a placement; None when there are none.

    ``identity`` is only called when it is needed: it may have to read a whole checkpoint.
    """
    if not placement.remotes:
        return None
    spans = [hop.span for hop in placement.plan.remote]
    try:
        session = Session(identity(), list(zip(placement.remotes, spans, strict=True)), options, plugins, report)
        session.open()
    except BaseException:
        placement.close()
        raise
    return session
