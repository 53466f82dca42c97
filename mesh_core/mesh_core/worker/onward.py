"""A session's way to the worker that continues its chain: a state that will not arrive is noticed within seconds.

The computing thread hands states on, the listening one looks for a loss meanwhile; a lock lets one of them at the
channels. As a host does, it pings over a connection of its own, where no large state keeps an answer waiting.

A member may name any worker as the next one, so what comes back costs little: one message is read at a look, within
narrow limits, and with the first that no worker sends both connections are over. They are read between steps too, so
that nothing piles up.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from time import monotonic

from mesh_codec.errors import CodecError
from mesh_core import wire
from mesh_core.errors import MeshError, NotAuthorised, PeerLost, WireMalformed
from mesh_core.system.config import Heartbeat
from mesh_core.transport.base import Channel
from mesh_core.wire.failure import rebuild
from mesh_core.wire.framing import Frame


class Onward:
    """Any thread may call it.

    Args:
        name: of that worker, for errors.
        channel: states are handed on over it.
        pulse: another one to the same worker, for pings.
        session: at that worker.
        heartbeat: when it counts as lost.

    Attributes:
        looked: time (monotonic) of the last `look`.
        near: whether that worker is this user's, on this machine; known once the way there was measured.
    """

    def __init__(self, name: str, channel: Channel, pulse: Channel, session: bytes, heartbeat: Heartbeat) -> None:
        self.session, self._name, self.near = session, name, bool(channel.way)
        self._channel, self._pulse, self._heartbeat = channel, pulse, heartbeat
        self._lock = threading.Lock()
        self._over = False
        self.looked = 0.0
        self._step: wire.Step | None = None
        self._until = self._pinged = 0.0
        self._unanswered: float | None = None

    def hand_on(self, step: wire.Step, buffers: Sequence[Frame]) -> None:
        """Send ``step``, and look after it for as long as its deadline. Raises as `Channel.send` does."""
        with self._lock:
            self._channel.send(wire.pack(step, buffers))
            self._step, self._until = step, monotonic() + step.deadline_ms / 1e3

    def look(self) -> tuple[wire.Step, Exception] | None:
        """The step that was handed on last and will not arrive, and why, told once. Does not wait."""
        self.looked = monotonic()
        if not self._lock.acquire(blocking=False):
            return None
        try:
            if self._step is not None and self.looked > self._until:
                self._step = None
            step = self._step
            if step is None and self._over:
                return None
            try:
                self._read(step)
                if step is not None:
                    self._beat()
            except (MeshError, CodecError) as error:
                self._step = None
                return (step, error) if step is not None else None
            return None
        finally:
            self._lock.release()

    def _read(self, step: wire.Step | None) -> None:
        """Raises:
        PeerLost: the next worker is gone, silent, or does not take states from here any more.
        MeshError, CodecError: what it says of the step.
        """
        try:
            failed = self._received(self._channel)
            if self._received(self._pulse) is not None:
                self._unanswered = None
        except NotAuthorised as error:
            raise PeerLost(f"The next worker, {self._name}, takes no states from here: {error.message}") from error
        except (MeshError, CodecError) as error:
            self._drop()
            raise PeerLost(f"The next worker, {self._name}, is lost: {error.message}") from error
        if step is not None and isinstance(failed, wire.Failed) and failed.id in (step.id, 0):
            raise rebuild(failed)

    def _received(self, channel: Channel) -> wire.Failed | wire.Pong | None:
        if (frames := channel.receive(0)) is None:
            return None
        answer, _ = wire.unpack(frames, wire.SENT_BACK)
        if not isinstance(answer, (wire.Failed, wire.Pong)):
            raise WireMalformed(f"It sends {type(answer).__name__}, which nobody asked for.")
        return answer

    def _beat(self) -> None:
        """Ping. Raises PeerLost: the next worker is silent."""
        now = monotonic()
        if self._unanswered is not None and now - self._unanswered > self._heartbeat.lost_after:
            raise PeerLost(f"The next worker, {self._name}, has not answered for {now - self._unanswered:.1f} s.")
        if now - self._pinged > self._heartbeat.interval:
            self._pulse.send(wire.pack(wire.Ping(wire.next_id(), b"")))
            self._pinged = now
            self._unanswered = self._unanswered or now

    def _drop(self) -> None:
        self._over = True
        self._channel.close()
        self._pulse.close()

    def close(self) -> None:
        """Drop both connections. May be called twice."""
        with self._lock:
            self._step = None
            self._drop()
