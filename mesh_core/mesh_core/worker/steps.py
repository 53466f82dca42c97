"""The steps of a worker's sessions: queued as they come, decoded, computed, encoded, and handed on.

A step is one job of the executor, and nobody waits for it here: its result leaves when it is there, for the host or for
the next worker. What a session keeps from one step for the next is its `StepMemory`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic, perf_counter
from typing import Any

import torch
from msgspec import structs

from mesh_core import wire
from mesh_core.crossing.sequences import Turn
from mesh_core.crossing.streams import Payload
from mesh_core.errors import PeerLost, WireMalformed
from mesh_core.model import attention
from mesh_core.model.adapter import Stage
from mesh_core.model.spec import Conditioning, State
from mesh_core.plugins.registry import Plugins
from mesh_core.system.device import synchronise
from mesh_core.system.logs import logger
from mesh_core.transport.base import Peer
from mesh_core.worker.agreement import not_near
from mesh_core.worker.constants import ConstantsCache
from mesh_core.worker.executor import Executor, Job
from mesh_core.worker.replies import Replies
from mesh_core.worker.session import WorkerSession
from mesh_core.worker.sessions import WorkerSessions

log = logger(__name__)

_LOOK_EVERY = 0.1
"""Seconds between two looks at what was handed on."""

_LOOK_FOR = 0.005
"""Seconds that a look may take for all sessions together; those that it does not come to are the next one's first."""


@dataclass
class WorkerSteps:
    """Takes constants and steps in any thread; computes in the executor's.

    Attributes:
        name: of the worker, for the trace of a step.
        device: where stages and constants are.
        longest: seconds that a step may take, whatever its host says.
    """

    name: str
    device: torch.device
    longest: float
    plugins: Plugins
    sessions: WorkerSessions
    constants: ConstantsCache
    executor: Executor
    replies: Replies
    _looked_at: float = field(default=0.0, init=False)

    def keep_constants(self, peer: Peer, message: wire.Constants, buffers: list[memoryview]) -> None:
        """Decode and cache constants that steps will name by their hashes."""
        owner = self.sessions.owned(peer, message.session).owner
        self.constants.take(message.tensors, buffers, self.plugins.codec("raw").decoder({}), owner)
        self.replies.send(peer.route, wire.Ok(message.id))

    def queue(self, peer: Peer, message: wire.Step, buffers: list[memoryview]) -> None:
        """Queue a step; its owner sends it, or a neighbour that was admitted for the session."""
        session = self.sessions.fed(peer, message.session)
        if session.memory.inputs.near and not peer.near:
            raise not_near()
        arrived = monotonic()
        if peer.key == session.owner and not message.trace:
            session.route = peer.route
        seconds = min(message.deadline_ms / 1e3, self.longest)
        job = Job(
            session.id,
            message.step,
            # Must not refer to the job: a cycle would keep the buffers until the garbage collector runs.
            run=lambda: self._compute(session, message, buffers, monotonic() - arrived, seconds),
            fail=lambda error: self.replies.fail(session.route, message, error),
            owner=session.owner,
            until=arrived + seconds,
        )
        self.executor.submit(job)

    def cancel(self, peer: Peer, message: wire.Cancel) -> None:
        """Stop a step, whether it waits or runs."""
        self.executor.cancel(self.sessions.owned(peer, message.session).id, message.step)

    def report_losses(self) -> None:
        """Tell hosts of steps that were handed on and will not arrive; in the listening thread, beside everything."""
        now = monotonic()
        if now < self._looked_at + _LOOK_EVERY:
            return
        self._looked_at = now
        following = [(session.next, session) for session in self.sessions if session.next is not None]
        for onward, session in sorted(following, key=lambda pair: pair[0].looked):
            if (lost := onward.look()) is not None:
                step, error = lost
                log.info("step %d was handed on and is lost: %s", step.step, error)
                self.replies.fail(session.route, structs.replace(step, session=session.id), error)
            if monotonic() - now > _LOOK_FOR:
                return

    def _compute(
        self, session: WorkerSession, message: wire.Step, buffers: list[memoryview], waited: float, seconds: float
    ) -> None:
        """All of one step. ``waited``: seconds that it was queued; ``seconds``: that it may take."""
        began = perf_counter()
        session.memory.begin(message.attempt)
        stage, turn = session.loaded.stage, Turn(message.sequence, message.step, message.after)
        conditioning = self._conditioning(stage, message)
        stage.attend_with(message.options.get(attention.OPTION))
        session.bounds.check(message.tensors, conditioning.constants, seconds)
        state = session.memory.inputs.decode(turn, message.tensors, buffers, self.device)
        _check_complete(stage, state)
        decoded = perf_counter()
        with torch.no_grad():
            result = stage(state, conditioning)
        synchronise(self.device)
        computed = perf_counter()
        payload = session.memory.outputs.encode(turn, result)
        report = {
            "worker": self.name,
            "span": str(stage.span),
            "in_coded": sum(b.nbytes for b in buffers),
            "in_raw": sum(t.nbytes for t in state.values()),
            "out_coded": payload.coded_bytes,
            "out_raw": payload.raw_bytes,
            "queue_ms": waited * 1e3,
            "decode_ms": (decoded - began) * 1e3,
            "compute_ms": (computed - decoded) * 1e3,
            "encode_ms": payload.ms,
            "busy_ms": (waited + perf_counter() - began) * 1e3,
        }
        self._hand_on(session, message, payload, [*message.trace, report])

    def _conditioning(self, stage: Stage, message: wire.Step) -> Conditioning:
        wanted = set(stage.spec.constants_of(stage.span))
        if unnamed := sorted(wanted - stage.spec.optional - message.constants.keys()):
            raise WireMalformed(f"Step {message.step} does not name the constant {unnamed[0]!r}.")
        constants = self.constants.get({n: h for n, h in message.constants.items() if n in wanted})
        return Conditioning(constants, dict(message.options))

    def _hand_on(
        self, session: WorkerSession, message: wire.Step, payload: Payload, trace: list[dict[str, Any]]
    ) -> None:
        """Send the result to the host, or the state to the worker that continues."""
        if session.next is None:
            result = wire.Result(message.id, message.session, message.step, message.attempt, payload.entries, trace)
            self.replies.send(session.route, result, payload.buffers)
            return
        onward = wire.Step(
            id=message.id,
            session=session.next.session,
            step=message.step,
            attempt=message.attempt,
            after=message.after,
            sequence=message.sequence,
            constants=message.constants,
            options=message.options,
            tensors=payload.entries,
            trace=trace,
            deadline_ms=message.deadline_ms,
        )
        try:
            session.next.hand_on(onward, payload.buffers)
        except PeerLost:
            # A worker that takes nothing is waited for once, not with every step: this is everybody's thread.
            session.next.close()
            raise


def _check_complete(stage: Stage, state: State) -> None:
    if missing := stage.spec.states[stage.span.start].keys() - stage.spec.optional - state.keys():
        raise WireMalformed(f"Tensor {min(missing)!r} was agreed on but did not come.")
