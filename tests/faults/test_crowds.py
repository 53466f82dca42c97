"""One that takes connections, or a worker's attention, for itself; and an honest host beside it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep

import pytest
import torch
import zmq

from mesh_core import wire
from mesh_core.host.remote import Remote
from mesh_core.plugins.registry import Plugins
from mesh_core.transport.base import Address
from mesh_core.transport.invites import accept_invite, create_invite
from mesh_core.transport.keys import KeyStore
from mesh_core.transport.zeromq import ZeroMqTransport
from tests.faults.conftest import IMPATIENT, Case
from tests.faults.processes import FastWorker, workers
from tests.support.splitting import split
from tests.support.workers import wait_until

FILES = 256
"""So few may the worker in a crowd have open; it needs about 60 of its own."""


@pytest.fixture(scope="module")
def cramped(model: Path) -> Iterator[FastWorker]:
    with workers(model.parent, 1, IMPATIENT, files=FILES) as (worker,):
        yield worker
        assert worker.process.is_alive()


@contextmanager
def crowd(address: str) -> Iterator[list[int]]:
    """Connections without a handshake, hundreds per second and held for as long as the worker lets them; how many."""
    host, _, port = address.removeprefix("mesh://").rpartition(":")
    count, enough = [0], threading.Event()

    def push() -> None:
        with ExitStack() as held:
            ends: list[socket.socket] = []
            while not enough.wait(0.001):
                with suppress(OSError):
                    ends.append(held.enter_context(socket.create_connection((host, int(port)), timeout=1)))
                    count[0] += 1
                if len(ends) > 400:
                    ends.pop(0).close()

    thread = threading.Thread(target=push)
    thread.start()
    try:
        yield count
    finally:
        enough.set()
        thread.join()


def test_a_crowd_of_connections_leaves_room_for_members(cramped: FastWorker, quick: Case, plugins: Plugins) -> None:
    with split(quick.path, ":1", [cramped.address], plugins, settings=IMPATIENT) as runner:
        assert torch.equal(runner(quick.inputs), quick.expected)
        with crowd(cramped.address) as count:
            most, end = 0, monotonic() + 60
            while count[0] < 2 * FILES and monotonic() < end:
                assert torch.equal(runner(quick.inputs), quick.expected)
                most = max(most, cramped.system.num_fds())
            another = Remote(Address(cramped.address), plugins, IMPATIENT)
            another.connect()
            another.close()
        assert runner.stats.reconnects == 0
        assert count[0] >= 2 * FILES and most < FILES - 32


class Flood:
    """A member of its own that sends ``frames`` over many connections, as fast as it can, and reads nothing."""

    CONNECTIONS = 8

    def __init__(self, worker: FastWorker, home: Path, frames: list[bytes]) -> None:
        self._keys, self._frames = KeyStore(home), frames
        accept_invite(str(create_invite(worker.address)), keys=self._keys)
        self._address = Address(worker.address, KeyStore().identity().server.public)
        self._enough, self.sent = threading.Event(), 0

    def __enter__(self) -> Flood:
        self._thread = threading.Thread(target=self._push)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join()

    def _push(self) -> None:
        transport = ZeroMqTransport(self._keys)
        channels = [transport.connect(self._address, 10) for _ in range(self.CONNECTIONS)]
        while not self._enough.is_set():
            for channel in channels:
                # One whose queue is full is not waited for.
                if channel.socket.poll(0, zmq.POLLOUT):  # type: ignore[attr-defined]
                    channel.send(self._frames)
                    self.sent += 1
        for channel in channels:
            channel.close()
        transport.close()


def header_of_nulls() -> bytes:
    """As large as a header may be, and in its form: lists that are each within the limits."""
    lists = (b"\xdc" + (4000).to_bytes(2, "big") + b"\xc0" * 4000) * 260
    info = b"\x81\xa1x\xdc" + (260).to_bytes(2, "big") + lists
    return bytes(wire.pack(wire.Opened(4, {}))[0]).replace(b"\xa4info\x80", b"\xa4info" + info)


@pytest.mark.parametrize("junk", [b"junk", header_of_nulls()], ids=["small", "nulls"])
def test_a_member_that_floods_keeps_nobody_waiting(
    steady: FastWorker, plugins: Plugins, tmp_path: Path, junk: bytes
) -> None:
    honest = Remote(Address(steady.address), plugins, IMPATIENT)
    honest.connect()
    with Flood(steady, tmp_path, [junk]) as flood:
        wait_until(lambda: flood.sent > 200, 30, "a flood")
        slowest = 0.0
        for _ in range(20):
            before = monotonic()
            honest.ask(wire.Ping(wire.next_id(), b""), wire.Pong, timeout=10)
            slowest = max(slowest, monotonic() - before)
            sleep(0.05)
        assert slowest < 1.0
    honest.close()
