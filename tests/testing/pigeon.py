"""A transport as a stranger's plugin brings it: a scheme of its own, over queues in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

from mesh_core.hookspecs import hookimpl
from mesh_core.transport.base import Address, Channel, Frames, Listener, Peer, Transport
from mesh_core.transport.inproc import InprocTransport


class PigeonTransport(InprocTransport):
    scheme: ClassVar[str] = "pigeon"

    def connect(self, address: Address, timeout: float) -> Channel:
        return super().connect(replace(address, text=address.text.replace("pigeon:", "inproc:", 1)), timeout)

    def listen(self, address: str, **options: object) -> Listener:
        return Loft(super().listen(address.replace("pigeon:", "inproc:", 1), **options))


class Loft(Listener):
    """Says where it listens in the words of its transport."""

    def __init__(self, inner: Listener) -> None:
        self.address = inner.address.replace("inproc:", "pigeon:", 1)
        self.inner = inner

    def receive(self, timeout: float) -> tuple[Peer, list[memoryview]] | None:
        return self.inner.receive(timeout)

    def send(self, route: bytes, frames: Frames) -> None:
        self.inner.send(route, frames)

    def wake(self) -> None:
        self.inner.wake()

    def close(self) -> None:
        self.inner.close()


@hookimpl
def mesh_register_transports(register: Callable[[Transport], None]) -> None:
    register(PigeonTransport())
