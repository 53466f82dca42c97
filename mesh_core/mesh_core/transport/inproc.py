"""The ``inproc`` transport: queues between threads of one process, for tests and for workers inside the host.

Behaves as one over a network does, but knows neither keys nor sockets. What is sent is copied unless it cannot change
(``bytes``, read-only views), as a network would: a receiver may keep it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from secrets import token_bytes, token_hex
from threading import Condition
from time import monotonic
from typing import ClassVar

from mesh_core.errors import ConfigError, PeerLost, TransportError, Unreachable
from mesh_core.transport.base import Address, Channel, Frame, Listener, Peer, Transport
from mesh_core.transport.frames import byte_views
from mesh_core.wire.limits import LIMITS, MessageLimits

_PREFIX = "inproc://"


class InprocTransport(Transport):
    """Listeners and channels of one instance see each other, and nobody else."""

    scheme: ClassVar[str] = "inproc"

    def __init__(self, limits: MessageLimits = LIMITS) -> None:
        self.limits = limits
        self.changed = Condition()
        self.listeners: dict[str, InprocListener] = {}

    def connect(self, address: Address, timeout: float) -> Channel:
        _check(address.text)
        with self.changed:
            if not self.changed.wait_for(lambda: address.text in self.listeners, timeout):
                raise Unreachable(f"Nobody in this process listens at {address.text}.", hint="start the worker first")
            channel = InprocChannel(self, self.listeners[address.text])
            channel.listener.peers[channel.route] = channel
            return channel

    def listen(self, address: str, **options: object) -> Listener:
        """See `Transport.listen`. ``inproc://`` alone makes a name up; there are no options."""
        _check(address)
        if options:
            raise ConfigError(f"The inproc transport has no option {min(options)!r}.")
        name = address if address != _PREFIX else _PREFIX + token_hex(8)
        with self.changed:
            if name in self.listeners:
                raise TransportError(f"{name} is taken.", hint="another name")
            self.listeners[name] = InprocListener(self, name)
            self.changed.notify_all()
            return self.listeners[name]

    def wait(self, channels: Sequence[Channel], timeout: float) -> list[Channel]:
        def ready() -> list[Channel]:
            return [c for c in channels if isinstance(c, InprocChannel) and (c.inbox or c.lost)]

        with self.changed:
            self.changed.wait_for(ready, timeout)
            return ready()


class InprocChannel(Channel):
    def __init__(self, transport: InprocTransport, listener: InprocListener) -> None:
        self.transport, self.listener = transport, listener
        self.route = token_bytes(16)
        self.inbox: deque[list[memoryview]] = deque()
        self.lost = False

    def send(self, frames: Sequence[Frame]) -> None:
        kept = _kept(frames, self.transport.limits)
        with self.transport.changed:
            if self.lost:
                raise PeerLost(f"The worker at {self.listener.address} is gone.")
            self.listener.inbox.append((Peer(self.route), kept))
            self.transport.changed.notify_all()

    def receive(self, timeout: float) -> list[memoryview] | None:
        with self.transport.changed:
            self.transport.changed.wait_for(lambda: self.inbox or self.lost, timeout)
            if self.inbox:
                return self.inbox.popleft()
            if self.lost:
                raise PeerLost(f"The worker at {self.listener.address} is gone.")
            return None

    def close(self) -> None:
        with self.transport.changed:
            self.lost = True
            self.inbox.clear()
            self.listener.peers.pop(self.route, None)
            self.transport.changed.notify_all()


class InprocListener(Listener):
    def __init__(self, transport: InprocTransport, name: str) -> None:
        self.address = name
        self.transport = transport
        self.inbox: deque[tuple[Peer, list[memoryview]]] = deque()
        self.peers: dict[bytes, InprocChannel] = {}
        self._woken = self._closed = False

    def receive(self, timeout: float) -> tuple[Peer, list[memoryview]] | None:
        deadline = monotonic() + timeout
        with self.transport.changed:
            self.transport.changed.wait_for(
                lambda: self.inbox or self._woken or self._closed, max(0.0, deadline - monotonic())
            )
            if self._woken or not self.inbox:
                self._woken = False
                return None
            return self.inbox.popleft()

    def send(self, route: bytes, frames: Sequence[Frame]) -> None:
        kept = _kept(frames, self.transport.limits)
        with self.transport.changed:
            peer = self.peers.get(route)
            if peer is not None:
                peer.inbox.append(kept)
                self.transport.changed.notify_all()

    def wake(self) -> None:
        with self.transport.changed:
            self._woken = True
            self.transport.changed.notify_all()

    def close(self) -> None:
        with self.transport.changed:
            self._closed = True
            if self.transport.listeners.get(self.address) is self:
                del self.transport.listeners[self.address]
            for peer in self.peers.values():
                peer.lost = True
            self.peers.clear()
            self.transport.changed.notify_all()


def _check(address: str) -> None:
    if not address.startswith(_PREFIX):
        raise ConfigError(f"{address[:200]!r} is not an address within a process.", hint="inproc://NAME")


def _kept(frames: Sequence[Frame], limits: MessageLimits) -> list[memoryview]:
    views = byte_views(frames, limits)
    return [view if view.readonly else memoryview(bytearray(view)) for view in views]
