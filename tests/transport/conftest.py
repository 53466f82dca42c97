"""Transports with keys of their own, and workers that answer in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mesh_core.transport.base import Address, Channel, Frame, Listener, Peer, Transport
from mesh_core.transport.inproc import InprocTransport
from mesh_core.transport.keys import KeyStore
from mesh_core.transport.zeromq import ZeroMqTransport

Answer = Callable[[Listener, Peer, list[memoryview]], None]


def echo(listener: Listener, peer: Peer, frames: list[memoryview]) -> None:
    """Send back what came."""
    listener.send(peer.route, frames)


class Serving:
    """A listener that a thread serves until `stop`."""

    def __init__(self, listener: Listener, answer: Answer = echo) -> None:
        self.listener, self.answer = listener, answer
        self.address = Address(listener.address)
        self.peers: list[Peer] = []
        self.errors: list[BaseException] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self.listener.wake()
        self._thread.join(10)
        assert not self._thread.is_alive()
        assert not self.errors

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


class Bench:
    """Makes transports, workers and channels for one test and closes all of them after it."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._transports: list[ZeroMqTransport] = []
        self._serving: list[Serving] = []
        self._channels: list[Channel] = []

    def keys(self, user: str) -> KeyStore:
        return KeyStore(self._home / user)

    def mesh(self, user: str = "owner", **options: object) -> ZeroMqTransport:
        transport = ZeroMqTransport(self.keys(user), **options)  # type: ignore[arg-type]
        self._transports.append(transport)
        return transport

    def serve(self, transport: Transport, address: str, answer: Answer = echo, **options: object) -> Serving:
        serving = Serving(transport.listen(address, **options), answer)
        self._serving.append(serving)
        return serving

    def connect(self, transport: Transport, address: Address, timeout: float = 5) -> Channel:
        channel = transport.connect(address, timeout)
        self._channels.append(channel)
        return channel

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        for serving in self._serving:
            serving.stop()
        for transport in self._transports:
            transport.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


class Kind:
    """One transport of the conformance tests."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.bench, self.name = bench, name
        self.transport: Transport = InprocTransport() if name == "inproc" else bench.mesh()
        self.address = {"inproc": "inproc://", "mesh": "mesh://127.0.0.1:0"}.get(
            name, "mesh://127.0.0.1:0?insecure=yes"
        )

    def serve(self, answer: Answer = echo) -> Serving:
        return self.bench.serve(self.transport, self.address, answer)

    def connect(self, serving: Serving, timeout: float = 5) -> Channel:
        return self.bench.connect(self.transport, serving.address, timeout)


@pytest.fixture(params=["inproc", "mesh", "mesh-insecure"])
def kind(request: pytest.FixtureRequest, bench: Bench) -> Kind:
    return Kind(bench, request.param)


def ask(channel: Channel, frames: list[Frame], timeout: float = 10) -> list[bytes]:
    """Send and wait for the answer."""
    channel.send(frames)
    answer = channel.receive(timeout)
    assert answer is not None, "no answer"
    return [bytes(frame) for frame in answer]
