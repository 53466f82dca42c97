"""Listeners that answer in a thread, and the transports and channels of one test, closed when it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, runtime_checkable

from mesh_core.transport.base import Address, Channel, Frames, Listener, Peer, Transport

Answer = Callable[[Listener, Peer, list[memoryview]], None]
"""What a listener does with a message."""


def echo(listener: Listener, peer: Peer, frames: list[memoryview]) -> None:
    """Send back what came."""
    listener.send(peer.route, frames)


def ask(channel: Channel, frames: Frames, timeout: float = 10) -> list[bytes]:
    """Send a message and wait for the answer; AssertionError where none comes within ``timeout`` seconds."""
    channel.send(frames)
    answer = channel.receive(timeout)
    assert answer is not None, "no answer"
    return [bytes(frame) for frame in answer]


class ListenerThread:
    """Serves ``listener`` in a thread until `stop`, and closes it then.

    Attributes:
        address: where it listens.
        peers: who sent each message so far.
        errors: what ended the thread, if anything did.
    """

    def __init__(self, listener: Listener, answer: Answer = echo) -> None:
        self.listener, self.answer = listener, answer
        self.address = Address(listener.address)
        self.peers: list[Peer] = []
        self.errors: list[BaseException] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def stop(self) -> None:
        """End it; AssertionError where it had failed, or does not end."""
        self._stopping = True
        self.listener.wake()
        self._thread.join(10)
        assert not self._thread.is_alive(), "the listener does not end: receive() must return after wake()"
        assert not self.errors, f"the listener's thread failed: {self.errors[0]!r}"

    def _serve(self) -> None:
        try:
            while not self._stopping:
                got = self.listener.receive(5)
                if got is not None:
                    self.peers.append(got[0])
                    self.answer(self.listener, *got)
        except BaseException as error:
            self.errors.append(error)
        finally:
            self.listener.close()


@runtime_checkable
class _Closable(Protocol):
    def close(self) -> None: ...


class TransportRig(AbstractContextManager["TransportRig"]):
    """Listens and connects for one test, and closes all of it at the end of the context."""

    def __init__(self) -> None:
        self._transports: list[Transport] = []
        self._listeners: list[ListenerThread] = []
        self._channels: list[Channel] = []

    def owns(self, transport: Transport) -> Transport:
        """Close ``transport`` too at the end, if it can be closed."""
        self._transports.append(transport)
        return transport

    def serve(self, transport: Transport, address: str, answer: Answer = echo, **options: object) -> ListenerThread:
        """Listen at ``address`` and answer in a thread."""
        thread = ListenerThread(transport.listen(address, **options), answer)
        self._listeners.append(thread)
        return thread

    def connect(self, transport: Transport, address: Address, timeout: float = 5) -> Channel:
        """A channel to ``address``; ``timeout`` in seconds."""
        channel = transport.connect(address, timeout)
        self._channels.append(channel)
        return channel

    def close(self) -> None:
        """End what was started; AssertionError as of `ListenerThread.stop`."""
        for channel in self._channels:
            channel.close()
        try:
            for thread in self._listeners:
                thread.stop()
        finally:
            for transport in self._transports:
                if isinstance(transport, _Closable):
                    transport.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
