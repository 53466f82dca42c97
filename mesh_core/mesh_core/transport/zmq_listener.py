"""A worker's end over ZeroMQ: a ROUTER socket that one thread owns, and an outbox through which any thread answers."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from secrets import token_hex
from time import monotonic
from typing import cast

import zmq

from mesh_core.errors import NotAuthorised, WireMalformed
from mesh_core.system.logs import logger
from mesh_core.transport.base import Listener, Peer, Trust, UnfitMessage
from mesh_core.transport.frames import byte_views
from mesh_core.transport.gate import Gate
from mesh_core.transport.memory_link import MemoryLinks
from mesh_core.transport.zmq_doors import Doors
from mesh_core.transport.zmq_errors import mapped_errors
from mesh_core.transport.zmq_socket import HERE, Context, Socket, Wire, close_with, milliseconds
from mesh_core.wire.framing import Frame
from mesh_core.wire.limits import GREETING

log = logger(__name__)

_CLOSING = 1.0

_SWEEPING = 2.0
"""Seconds between two looks at memory of peers that are gone."""

_REFUSED = [memoryview(b"")]
"""What a peer gets whose key was revoked while it was connected; no message of the mesh looks like it."""


class ZmqListener(Listener):
    """See `Listener`.

    Args:
        socket: a ROUTER socket that is bound.
        address: where, as a host would write it.
        gate: who is trusted; None where nobody proves a key.
        wire: how messages cross; the same at both ends.
        doors: who is connected to the socket.
        memories: of peers that share memory with this process.
        closed: called once, when the listener is closed.
    """

    def __init__(
        self,
        context: Context,
        socket: Socket,
        address: str,
        gate: Gate | None,
        wire: Wire,
        doors: Doors,
        memories: MemoryLinks,
        closed: Callable[[], None],
    ) -> None:
        self.address, self._doors, self._memories = address, doors, memories
        self._swept = 0.0
        self._socket, self._gate, self._wire, self._when_closed = socket, gate, wire, closed
        self._outbox: deque[tuple[bytes, list[memoryview]]] = deque()
        self._lock = threading.Lock()
        self._signalled = self._woken = self._closed = False
        self._owner: int | None = None
        pipe = f"inproc://mesh.wake.{token_hex(8)}"
        self._bell: Socket = context.socket(zmq.PAIR)
        self._bell.bind(pipe)
        self._ring: Socket = context.socket(zmq.PAIR)
        self._ring.connect(pipe)
        close_with(self, socket, self._bell, self._ring)
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._bell, zmq.POLLIN)

    def receive(self, timeout: float) -> tuple[Peer, list[memoryview]] | None:
        self._owner = threading.get_ident()
        deadline = monotonic() + timeout
        self._sweep()
        with mapped_errors(f"Receiving at {self.address}"):
            while not self._closed:
                left = deadline - monotonic()
                ready = dict(self._poller.poll(milliseconds(left)))
                if self._bell in ready and self._answer_bell():
                    return None
                if self._socket in ready and (got := self._take()) is not None:
                    return got
                if not ready and left <= 0:
                    return None
        return None

    def send(self, route: bytes, frames: Sequence[Frame]) -> None:
        views = byte_views(frames, self._wire.limits)
        link = self._memories.get(route)
        self._outbox.append((route, views if link is None else link.outgoing(views)))
        if threading.get_ident() == self._owner:
            self._flush()
        else:
            self._signal()

    def wake(self) -> None:
        self._woken = True
        self._signal()

    def admit(self, key: str) -> None:
        if self._gate is not None:
            self._gate.admit(key)

    def dismiss(self, key: str) -> None:
        if self._gate is not None:
            self._gate.dismiss(key)

    def enrol(self, peer: Peer, key: str, name: str) -> None:
        if self._gate is None or peer.trust != "enrolling":
            raise NotAuthorised("Only a key that came in on an invite may enrol.", hint="mesh join INVITE")
        self._gate.keys.redeem(peer.key, key, name)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._ring.close(linger=0)
        self._bell.close(linger=0)
        self._stop_listening()
        self._socket.close()
        self._memories.close()
        self._when_closed()

    def _stop_listening(self) -> None:
        """Free the port before `close` returns; closing a socket alone frees it some time later."""
        try:
            self._socket.unbind(cast(bytes, self._socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode())
            self._doors.wait_unbound(_CLOSING)
        except zmq.ZMQError as error:
            log.warning("the port of %s is freed late: %s", self.address, error)
        finally:
            self._socket.disable_monitor()
            self._doors.join()

    def _signal(self) -> None:
        with self._lock:
            if not self._signalled and not self._closed:
                self._signalled = True
                self._ring.send(b"")

    def _answer_bell(self) -> bool:
        """Send what waits in the outbox; true if `wake` was called."""
        with self._lock:
            self._bell.recv()
            self._signalled = False
            woken, self._woken = self._woken, False
        self._flush()
        return woken

    def _flush(self) -> None:
        while self._outbox and not self._closed:
            route, views = self._outbox.popleft()
            try:
                self._wire.send(self._socket, [memoryview(route), *views])
            except zmq.ZMQError as error:
                log.warning("an answer was dropped: %s", error)
                if (link := self._memories.get(route)) is not None:
                    link.not_sent(views)

    def _take(self) -> tuple[Peer, list[memoryview]] | None:
        first = self._socket.recv(zmq.NOBLOCK, copy=False)
        route, key, trust = first.bytes, "", cast("Trust | None", "member")
        if self._gate is not None:
            key = str(first.get("User-Id"))
            trust = self._gate.trust(key)
        frames = self._wire.receive(self._socket, None if trust in ("member", "neighbour") else GREETING)
        if trust is None:
            self._outbox.append((route, _REFUSED))
            self._flush()
            return None
        if not self._doors.spoke(first.get(zmq.SRCFD), key) or frames == HERE:
            return None
        peer = Peer(route, key, trust, near=self._memories.get(route) is not None)
        if (answer := self._memories.answer(route, key, frames)) is not None:
            self._outbox.append((route, answer))
            self._flush()
            return None
        try:
            return peer, self._memories.incoming(route, frames)
        except WireMalformed as error:
            raise UnfitMessage(peer, error) from error

    def _sweep(self) -> None:
        if monotonic() > self._swept + _SWEEPING:
            self._swept = monotonic()
            self._memories.sweep()
