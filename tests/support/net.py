"""Ports for servers that cannot be asked which one they took, and links that do what a test wants."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from random import randrange

import pytest

from mesh_core.transport.memory_link import SWITCH

Carry = Callable[[socket.socket, socket.socket, int, bool], None]
"""Moves what the first socket gives to the second until there is no more: of the connection with that number, from 0,
and the way there (True) or back."""


def free_port() -> int:
    """A TCP port of the loopback that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def lasting_port() -> int:
    """A port that stays free while a worker is started again: one that the system does not give to whoever asks."""
    while True:
        port = randrange(12_000, 30_000)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def relayed(address: str, carry: Carry) -> Iterator[str]:
    """Another address of the worker at ``address``; ``carry`` moves its bytes, and OSErrors end a connection."""
    host, _, port = address.removeprefix("mesh://").rpartition(":")
    server = socket.create_server(("127.0.0.1", 0))
    patch = pytest.MonkeyPatch()
    # What this process shares with the worker would not cross the link.
    patch.setenv(SWITCH, "0")

    def pump(source: socket.socket, target: socket.socket, number: int, there: bool) -> None:
        with suppress(OSError):
            carry(source, target, number, there)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def accept() -> None:
        with suppress(OSError):
            for number in count():
                caller = server.accept()[0]
                try:
                    worker = socket.create_connection((host, int(port)))
                except OSError:
                    caller.close()
                    continue
                for pair in ((caller, worker, number, True), (worker, caller, number, False)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"mesh://127.0.0.1:{server.getsockname()[1]}"
    finally:
        # Closing alone does not wake a thread that waits in accept().
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(10)
        patch.undo()


def cut_after(nbytes: int, *, there: bool, spared: Callable[[int], bool] = lambda number: False) -> Carry:
    """Breaks each connection off once it has carried ``nbytes`` in one direction.

    Args:
        there: towards the worker.
        spared: by its number, whether a connection is left alone.
    """

    def carry(source: socket.socket, target: socket.socket, number: int, towards: bool) -> None:
        left = 1 << 60 if towards is not there or spared(number) else nbytes
        while left and (data := source.recv(min(left, 1 << 16))):
            target.sendall(data)
            left -= len(data)

    return carry
