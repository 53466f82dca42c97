"""The sessions of a worker: opening stages for them, keeping their constants, computing their steps.

Knows messages and sessions; how messages come and go is the worker's.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic, perf_counter
from typing import Any

import torch

from mesh_codec.base import CodecChoice, DecodeLimits, Encoded
from mesh_codec.dtypes import from_name
from mesh_core import wire
from mesh_core.crossing.bandwidth import measure_one_way, plain_link
from mesh_core.crossing.codec_speed import SpeedBook
from mesh_core.crossing.constants import digest
from mesh_core.crossing.streams import Streams, aligned
from mesh_core.errors import PlanDoesNotFit, PlanError, SessionUnknown, TransportTimeout, WireMalformed, WireTooLarge
from mesh_core.loras.library import Shelf
from mesh_core.loras.patch import Applied, set_key
from mesh_core.model.library import Checkpoint, Library
from mesh_core.model.spans import BlockSpan
from mesh_core.model.spec import Conditioning
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Settings
from mesh_core.system.device import synchronise
from mesh_core.transport.base import Address, Channel, Frame, Listener, Peer
from mesh_core.wire.failure import rebuild
from mesh_core.worker.executor import Executor, Job
from mesh_core.worker.loras import LoraHosting
from mesh_core.worker.session import QUOTA, ConstantsCache, HostedSession
from mesh_core.worker.stages import Loaded, StageKey, StageStore

log = logging.getLogger(__name__)

Send = Callable[[bytes, wire.Message, list[Frame]], None]
Fail = Callable[[bytes, wire.Message, BaseException], None]

_LOOK_EVERY = 0.1
"""Seconds between two looks for hosts that are gone: not with every message, while a step waits to be computed."""

_REPORT_EVERY = 0.2
"""Seconds between two progress messages of one load."""


@dataclass
class Hosting:
    """Everything that the sessions of one worker share."""

    name: str
    device: torch.device
    settings: Settings
    plugins: Plugins
    library: Library
    stages: StageStore
    executor: Executor
    listener: Listener
    speeds: SpeedBook
    send: Send
    fail: Fail
    shelf: Shelf
    preset: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        self.loras = LoraHosting(
            self.shelf, self.library, self.stages, self.executor, self.send, self.owned, self.preset
        )
        self.constants = ConstantsCache(self.device, self.settings.worker.constants_cache)
        self._limits = DecodeLimits()
        self._sessions: dict[bytes, HostedSession] = {}
        self._lock = threading.Lock()
        self._looked_at = 0.0

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, peer: Peer, message: wire.Open) -> None:
        """Load the stage and open, or reopen with another span, a session. Runs in a loading thread."""
        progress = _Reporter(lambda *p: self.send(peer.route, wire.Progress(message.id, *p), []))
        inputs, outputs = self._streams(message.inputs), self._streams(message.outputs)
        if message.session in self._sessions:
            self.owned(peer, message.session)
        checkpoint = self.library.find(
            message.family, message.structure, message.fingerprint, progress.phase("checking weights")
        )
        span = BlockSpan(*message.span)
        if span.stop > checkpoint.spec.blocks or not len(span):
            raise PlanError(
                f"Span {span} is not in {checkpoint.name}, which has {checkpoint.spec.blocks} blocks.",
                hint=f"a span within :{checkpoint.spec.blocks}",
            )
        dtype = from_name(message.dtype)
        if not dtype.lossy:
            raise PlanError(f"No model computes in {dtype.name}.", hint="float32, float16 or bfloat16")
        for cut, streams in ((span.start, inputs), (span.stop, outputs)):
            if streams.names != checkpoint.spec.states[cut].keys():
                wanted = ", ".join(sorted(checkpoint.spec.states[cut]))
                raise WireMalformed(
                    f"At block {cut} of {checkpoint.name}, {wanted} cross; other tensors were agreed on."
                )
        loras = self.loras.resolve(message.loras, checkpoint, span)
        key = StageKey(message.fingerprint, span, dtype.torch, set_key(loras))
        loaded = self._acquire(checkpoint, key, progress.phase("loading"), loras)
        try:
            channel, session_there = self._follow(message.next)
            link = self._measured(channel) if message.options.get("measure") is True else {}
        except BaseException:
            self.stages.release(key)
            raise
        session = HostedSession(
            message.session,
            peer.key,
            peer.route,
            loaded,
            inputs,
            outputs,
            checkpoint,
            channel,
            session_there,
        )
        with self._lock:
            # Looked up only now: an earlier request for the same session may have been served meanwhile.
            old = self._sessions.get(session.id)
            self._sessions[session.id] = session
        if old is not None:
            self.executor.cancel(old.id)
            self._forget(old)
        self.loras.keep(session, loras)
        self._forget_surplus(peer.key)
        info: dict[str, Any] = {
            "bytes_read": loaded.bytes_read,
            "seconds": loaded.seconds,
            "loaded": self.stages.nbytes,
        }
        info |= {"speeds": self.speeds.plain(), **link}
        self.send(peer.route, wire.Opened(message.id, info), [])

    def _acquire(
        self,
        checkpoint: Checkpoint,
        key: StageKey,
        progress: Callable[[int, int], None],
        loras: tuple[Applied, ...],
    ) -> Loaded:
        try:
            return self.stages.acquire(checkpoint, key, progress, loras)
        except PlanDoesNotFit:
            # Hosts that crashed did not close their sessions; one that is only idle opens its session again.
            if not self._forget_silent(self.settings.worker.yields_after):
                raise
            return self.stages.acquire(checkpoint, key, progress, loras)

    def _follow(self, following: Mapping[str, Any] | None) -> tuple[Channel | None, bytes]:
        if following is None:
            return None, b""
        try:
            address, session = Address(following["address"], following["server_key"]), following["session"]
        except KeyError as error:
            raise WireMalformed(f"The next worker of a chain came without {error}.") from error
        transport = self.plugins.transport(address.scheme)
        return transport.connect(address, self.settings.deadlines.connect), session

    def _measured(self, channel: Channel | None) -> dict[str, Any]:
        """What this worker says of its way to the next one."""
        if channel is None:
            return {}

        def send(nbytes: int) -> None:
            probe = wire.Probe(wire.next_id(), 0)
            channel.send(wire.pack(probe, [bytes(nbytes)] if nbytes else []))
            while (frames := channel.receive(self.settings.deadlines.connect)) is not None:
                answer, _ = wire.unpack(frames)
                if isinstance(answer, wire.Failed):
                    raise rebuild(answer)
                if answer.id == probe.id:
                    return
            raise TransportTimeout("The next worker does not answer a probe.", hint="mesh doctor on this machine")

        return {"link": plain_link(measure_one_way(send))}

    def _streams(self, choices: Mapping[str, Any]) -> Streams:
        try:
            chosen = {name: CodecChoice(c["codec"], c["settings"]) for name, c in choices.items()}
        except (KeyError, TypeError) as error:
            raise WireMalformed("A codec choice is a map with 'codec' and 'settings'.") from error
        return Streams(chosen, self.plugins.codecs(), self._limits)

    def owned(self, peer: Peer, session: bytes) -> HostedSession:
        """The session, if ``peer`` opened it; marks it as seen.

        Raises:
            SessionUnknown: it is not here, or another's.
        """
        found = self._sessions.get(session)
        if found is None or peer.key != found.owner or peer.trust != "member":
            raise SessionUnknown(f"{self.name} does not hold that session.")
        # Not the route: hosts ping over a connection of its own, and results go where steps come from.
        found.last_seen = monotonic()
        return found

    def seen(self, peer: Peer, session: bytes) -> None:
        """A host is alive and believes to have ``session`` here; b"" if it has none.

        Raises:
            SessionUnknown: it is wrong, since this worker was restarted or forgot the session.
        """
        if session:
            self.owned(peer, session)

    def admit(self, peer: Peer, message: wire.Admit) -> None:
        """Let a neighbouring worker hand over states for a session."""
        neighbours = self.owned(peer, message.session).neighbours
        if len(neighbours | {message.key}) > QUOTA.neighbours:
            raise WireTooLarge(f"{len(neighbours)} neighbours were admitted for one session already.")
        neighbours.add(message.key)
        self.listener.admit(message.key)
        self.send(peer.route, wire.Ok(message.id), [])

    def keep_constants(self, peer: Peer, message: wire.Constants, buffers: list[memoryview]) -> None:
        """Decode and cache constants, each checked against the hash that names it."""
        self.owned(peer, message.session)
        decoder = self.plugins.codec("raw").decoder({}, self._limits)
        position = 0
        for item in message.tensors:
            coded = Encoded(item["h"], buffers[position : position + item["k"]])
            position += item["k"]
            tensor = decoder.decode(coded, self.device)
            if digest(coded) != item["hash"]:
                raise WireMalformed("A constant does not have the hash that it came with.")
            # On the CPU the tensor is a view of the network buffer, which lives as long as the cache entry.
            self.constants.put(item["hash"], aligned(tensor))
        self.send(peer.route, wire.Ok(message.id), [])

    def cancel(self, peer: Peer, message: wire.Cancel) -> None:
        self.executor.cancel(self.owned(peer, message.session).id, message.step)

    def close(self, peer: Peer, message: wire.Close) -> None:
        self._drop(self.owned(peer, message.session))

    def close_all(self) -> None:
        """Forget all sessions; the executor must have stopped."""
        for session in list(self._sessions.values()):
            self._drop(session)
            session.close()

    def _forget(self, session: HostedSession) -> None:
        self.loras.forget(session)
        self.stages.release(session.loaded.key)
        for key in session.neighbours:
            if not any(key in s.neighbours for s in list(self._sessions.values())):
                self.listener.dismiss(key)
        if session.next is not None:
            # Only the computing thread uses the channel, and a channel is one thread's. Under a name of its own, so
            # that neither the session's quota nor its cancelling concerns it.
            closing = b"close" + session.id
            self.executor.submit(Job(closing, 0, session.close, lambda e: log.warning("a channel stays open: %s", e)))

    def _forget_surplus(self, owner: str) -> None:
        theirs = sorted((s for s in list(self._sessions.values()) if s.owner == owner), key=lambda s: s.last_seen)
        for session in theirs[: -QUOTA.sessions]:
            self._drop(session)

    def _forget_silent(self, seconds: float) -> bool:
        """Forget the sessions that compute nothing and were silent for so long; whether there were any."""
        now, busy = monotonic(), self.executor.busy()
        silent = [s for s in list(self._sessions.values()) if s.id not in busy and now - s.last_seen > seconds]
        dropped = [session for session in silent if self._drop(session)]
        return bool(dropped)

    def _drop(self, session: HostedSession) -> bool:
        """Forget a session unless another thread just did, or opened it anew."""
        with self._lock:
            if self._sessions.get(session.id) is not session:
                return False
            del self._sessions[session.id]
        self.executor.cancel(session.id)
        self._forget(session)
        return True

    def stop_orphans(self) -> None:
        """Stop the steps of hosts that went silent, and forget sessions that nobody has used for long."""
        now = monotonic()
        if now < self._looked_at + _LOOK_EVERY:
            return
        self._looked_at, busy = now, self.executor.busy()
        for session in list(self._sessions.values()):
            silent = now - session.last_seen
            if session.id in busy and silent > self.settings.worker.orphaned_after:
                log.info("a host has been silent for %.0f s during its step; the step stops", silent)
                self.executor.cancel(session.id)
        self._forget_silent(self.settings.worker.idle_after)

    def step(self, peer: Peer, message: wire.Step, buffers: list[memoryview]) -> None:
        """Queue a step; its owner sends it, or a neighbour that was admitted for the session."""
        session = self._sessions.get(message.session)
        if session is None or (peer.key != session.owner and peer.key not in session.neighbours):
            raise SessionUnknown(f"{self.name} does not hold that session.")
        # What a neighbour hands on comes from the host too, which need not talk to this worker between steps.
        session.last_seen = arrived = monotonic()
        if peer.key == session.owner and not message.trace:
            session.route = peer.route
        job = Job(
            session.id,
            message.step,
            # Must not refer to the job: a cycle would keep the buffers until the garbage collector runs.
            run=lambda: self._compute(session, message, buffers, monotonic() - arrived),
            fail=lambda error: self.fail(session.route, message, error),
        )
        self.executor.submit(job)

    def _compute(self, session: HostedSession, message: wire.Step, buffers: list[memoryview], waited: float) -> None:
        if waited * 1e3 > message.deadline_ms:
            raise TransportTimeout(f"Step {message.step} waited {waited:.0f} s, longer than its deadline.")
        began = perf_counter()
        session.restart_streams(message.attempt)
        stage = session.loaded.stage
        wanted = set(stage.spec.constants_of(stage.span))
        if unnamed := sorted(wanted - stage.spec.optional - message.constants.keys()):
            raise WireMalformed(f"Step {message.step} does not name the constant {unnamed[0]!r}.")
        constants = self.constants.get({n: h for n, h in message.constants.items() if n in wanted})
        state = session.inputs.decode(message.sequence, message.tensors, buffers, self.device)
        if missing := stage.spec.states[stage.span.start].keys() - stage.spec.optional - state.keys():
            raise WireMalformed(f"Tensor {min(missing)!r} was agreed on but did not come.")
        decoded = perf_counter()
        with torch.no_grad():
            result = stage(state, Conditioning(constants, dict(message.options)))
        synchronise(self.device)
        computed = perf_counter()
        payload = session.outputs.encode(message.sequence, result)
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
        self._pass_on(session, message, payload.entries, payload.buffers, [*message.trace, report])

    def _pass_on(
        self,
        session: HostedSession,
        message: wire.Step,
        entries: list[dict[str, Any]],
        buffers: list[Frame],
        trace: list[dict[str, Any]],
    ) -> None:
        if session.next is None:
            result = wire.Result(message.id, message.session, message.step, message.attempt, entries, trace)
            self.send(session.route, result, buffers)
            return
        onward = wire.Step(
            id=message.id,
            session=session.next_session,
            step=message.step,
            attempt=message.attempt,
            sequence=message.sequence,
            constants=message.constants,
            options=message.options,
            tensors=entries,
            trace=trace,
            deadline_ms=message.deadline_ms,
        )
        session.next.send(wire.pack(onward, buffers))


class _Reporter:
    """Sends progress, but not more often than a person can read it."""

    def __init__(self, send: Callable[[str, int, int], None]) -> None:
        self._send, self._last = send, 0.0

    def phase(self, name: str) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            if done >= total or monotonic() - self._last > _REPORT_EVERY:
                self._last = monotonic()
                self._send(name, done, total)

        return report
