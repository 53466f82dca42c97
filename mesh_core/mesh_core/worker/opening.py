"""Opening a session at a worker, and changing the LoRAs of one that is open: both give it another stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic, sleep
from typing import Any

from mesh_core import wire
from mesh_core.crossing.speed_book import SpeedBook
from mesh_core.errors import PlanDoesNotFit, SessionUnknown, TransportTimeout
from mesh_core.loras.lora import Applied, set_key
from mesh_core.model.checkpoint import ReadingProgress
from mesh_core.model.library import Checkpoint, CheckpointLibrary
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Settings
from mesh_core.transport.base import Peer
from mesh_core.wire import phases
from mesh_core.worker.agreement import check_crossing, not_near, numerics_of, span_of, streams_of
from mesh_core.worker.bounds import StepBounds, decode_limits
from mesh_core.worker.executor import Executor
from mesh_core.worker.loras import WorkerLoras
from mesh_core.worker.named_locks import NamedLocks
from mesh_core.worker.neighbour import connect_next, measured_link
from mesh_core.worker.onward import Onward
from mesh_core.worker.replies import Replies
from mesh_core.worker.session import StepMemory, WorkerSession
from mesh_core.worker.sessions import WorkerSessions
from mesh_core.worker.stage_table import StageKey
from mesh_core.worker.stages import Loaded, StageStore

_REPORT_EVERY = 0.2
"""Seconds between two progress messages of one load."""

_STOPS_WITHIN = 60.0
"""Seconds for a step that nobody waits for any more to come to the end of its block."""


@dataclass
class SessionOpener:
    """Runs in loading threads, beside the steps of other sessions; of one session, one request at a time."""

    settings: Settings
    plugins: Plugins
    library: CheckpointLibrary
    stages: StageStore
    executor: Executor
    loras: WorkerLoras
    sessions: WorkerSessions
    speeds: SpeedBook
    replies: Replies
    _changing: NamedLocks = field(default_factory=NamedLocks, init=False)

    def open(self, peer: Peer, message: wire.Open) -> None:
        """Load the stage and open, or reopen with another span, a session."""
        with self._changing.held(message.session):
            self._open(peer, message)

    def _open(self, peer: Peer, message: wire.Open) -> None:
        progress = _ThrottledProgress(lambda *p: self.replies.send(peer.route, wire.Progress(message.id, *p)))
        device, step_memory = self.stages.memory.device, self.settings.worker.step_memory
        limits = decode_limits(step_memory)
        inputs, outputs = (streams_of(c, self.plugins, limits) for c in (message.inputs, message.outputs))
        memory = StepMemory(inputs, outputs)
        before = self.sessions.owned(peer, message.session) if message.session in self.sessions else None
        checkpoint = self.library.find(
            message.family, message.structure, message.fingerprint, progress.phase(phases.CHECKING)
        )
        span = span_of(checkpoint, message.span)
        numerics = numerics_of(message, checkpoint, span, self.plugins.weight_formats(), device)
        check_crossing(checkpoint, span.start, memory.inputs)
        check_crossing(checkpoint, span.stop, memory.outputs)
        continues = before is not None and before.memory.alike(memory)
        if before is not None and continues:
            # Only the connection was lost: the next step is predicted from what was there before.
            memory = before.memory
        loras = self.loras.resolve(message.loras, checkpoint, span)
        key = StageKey(message.structure, message.fingerprint, span, numerics, set_key(loras))
        loaded = self._acquire(checkpoint, key, progress.phase(phases.LOADING), loras)
        try:
            onward, link = self._follow(message.next, measure=message.options.get("measure") is True or outputs.near)
        except BaseException:
            self.stages.release(loaded)
            raise
        if outputs.near and not (peer.near if onward is None else onward.near):
            self.stages.release(loaded)
            if onward is not None:
                onward.close()
            raise not_near()
        bounds = StepBounds(checkpoint, span, numerics.dtype, device, step_memory)
        session = WorkerSession(message.session, peer.key, peer.route, loaded, checkpoint, memory, bounds, onward)
        self.loras.keep(session, loras)
        self.sessions.put(session)
        info = self._cost(loaded, loaded.seconds) | {"speeds": self.speeds.plain(), "continues": continues, **link}
        self.replies.send(peer.route, wire.Opened(message.id, info))

    def adjust(self, peer: Peer, message: wire.Adjust) -> None:
        """Give an open session other LoRAs."""
        with self._changing.held(message.session):
            self._adjust(peer, message)

    def _adjust(self, peer: Peer, message: wire.Adjust) -> None:
        began = monotonic()
        session = self.sessions.owned(peer, message.session)
        span = session.loaded.stage.span
        applied = self.loras.resolve(message.loras, session.checkpoint, span, session.loras)
        self._end_steps(session)
        session.loaded = self.stages.adjust(session.checkpoint, session.loaded, applied)
        try:
            self.sessions.owned(peer, message.session)
        except SessionUnknown:
            # It ended meanwhile, and gave back what it had before.
            self.stages.release(session.loaded)
            raise
        self.loras.keep(session, applied)
        self.replies.send(peer.route, wire.Opened(message.id, self._cost(session.loaded, monotonic() - began)))

    def _cost(self, loaded: Loaded, seconds: float) -> dict[str, Any]:
        return {"bytes_read": loaded.bytes_read, "seconds": seconds, "loaded": self.stages.nbytes}

    def _acquire(
        self, checkpoint: Checkpoint, key: StageKey, progress: ReadingProgress, loras: tuple[Applied, ...]
    ) -> Loaded:
        try:
            return self.stages.acquire(checkpoint, key, progress, loras)
        except PlanDoesNotFit:
            # Hosts that crashed did not close their sessions; one that is only idle opens its session again.
            if not self.sessions.forget_silent(self.settings.worker.yields_after):
                raise
            return self.stages.acquire(checkpoint, key, progress, loras)

    def _follow(self, following: Mapping[str, Any] | None, *, measure: bool) -> tuple[Onward | None, dict[str, Any]]:
        """The way to the next worker, and what the answer says of it."""
        if following is None:
            return None, {}
        timeout = self.settings.deadlines.connect
        channel, session = connect_next(following, self.plugins, timeout)
        try:
            link = {"link": measured_link(channel, timeout)} if measure else {}
            pulse, _ = connect_next(following, self.plugins, timeout)
        except BaseException:
            channel.close()
            raise
        return Onward(following["address"], channel, pulse, session, self.settings.heartbeat), link

    def _end_steps(self, session: WorkerSession) -> None:
        """Wait until nothing of the session computes: a step that was given up may still be in its last block."""
        self.executor.cancel(session.id)
        end = monotonic() + _STOPS_WITHIN
        while session.id in self.executor.busy():
            if monotonic() > end:
                raise TransportTimeout("A step of the session does not stop.", hint="the same again")
            sleep(0.001)


class _ThrottledProgress:
    """Sends progress, but not more often than a person can read it."""

    def __init__(self, send: Callable[[str, int, int], None]) -> None:
        self._send, self._last = send, 0.0

    def phase(self, name: str) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            if done >= total or monotonic() - self._last > _REPORT_EVERY:
                self._last = monotonic()
                self._send(name, done, total)

        return report
