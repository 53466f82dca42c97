"""One that takes connections, or a worker's attention, for itself; and an honest host beside it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic

import pytest
import torch
import zmq

from mesh_core import wire
from mesh_core.errors import WireTooLarge
from mesh_core.host.remote import Remote
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Heartbeat
from mesh_core.transport.base import Address, Channel
from mesh_core.transport.curve import public_of
from mesh_core.transport.invites import accept_invite, create_invite, parse_invite
from mesh_core.transport.keys import KeyPair, KeyStore
from mesh_core.transport.memory_link import SWITCH
from mesh_core.transport.zeromq import ZeroMqTransport
from mesh_core.worker.quota import QUOTA
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
    patient = replace(IMPATIENT, heartbeat=Heartbeat(interval=0.2, lost_after=60.0))
    honest, waited = Remote(Address(steady.address), plugins, patient), []
    honest.connect()
    with Flood(steady, tmp_path, [junk]) as flood:
        wait_until(lambda: flood.sent > 200, 30, "a flood")
        for _ in range(15):
            before = monotonic()
            honest.ask(wire.Ping(wire.next_id(), b""), wire.Pong, timeout=60)
            waited.append(monotonic() - before)
    honest.close()
    # Not the slowest: this process and the flood share what processors there are.
    assert sorted(waited)[len(waited) // 2] < 1.0


def answer(channel: Channel, frames: list[bytes]) -> wire.Message:
    channel.send(frames)
    got = channel.receive(10)
    assert got is not None
    return wire.unpack(got)[0]


def test_whoever_is_no_member_may_say_little(steady: FastWorker, tmp_path: Path) -> None:
    """What it may not send is refused by its size, before it is looked at; what it may is answered all the same."""
    invite = parse_invite(str(create_invite(steady.address)))
    transport = ZeroMqTransport(KeyStore(tmp_path))
    own = KeyPair(public_of(invite.token), invite.token)
    channel = transport.connect(Address(steady.address, invite.server_key), 5, client=own)
    hello = wire.Hello(1, [wire.VERSION], "0.1.0", {}, "guest")
    many = wire.Hello(2, [wire.VERSION], "0.1.0", {str(number): "1" for number in range(300)}, "guest")
    for junk in ([header_of_nulls()], [b"x"] * 100, [*wire.pack(hello), b"x"], wire.pack(many)):
        refused = answer(channel, junk)
        assert isinstance(refused, wire.Failed) and refused.error == "WireTooLarge", refused
    assert isinstance(answer(channel, wire.pack(hello)), wire.Welcome)
    enrol = wire.Enrol(3, KeyStore(tmp_path).identity().client.public, "guest")
    assert isinstance(answer(channel, wire.pack(enrol)), wire.Enrolled)
    channel.close()
    transport.close()


def test_answers_that_nobody_reads_are_few(
    steady: FastWorker, plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, "0")
    greedy = Remote(Address(steady.address), plugins, IMPATIENT)
    greedy.connect()
    before, asked = steady.resident(), 100
    for _ in range(asked):
        greedy.tell(wire.Probe(wire.next_id(), wire.PROBE_BYTES))
    answers: list[wire.Message] = []
    while len(answers) < asked:
        frames = greedy.channel.receive(10)
        assert frames is not None
        answers.append(wire.unpack(frames)[0])
    refused = [a for a in answers if isinstance(a, wire.Failed)]
    assert {a.error for a in refused} == {"WireTooLarge"}
    assert 0 < asked - len(refused) < asked // 2  # some were read while others were asked for
    assert steady.resident() - before < 2 * QUOTA.probe_bytes
    wait_until(lambda: _is_measured(greedy), 10, "an answer after the others were read")
    greedy.close()


def _is_measured(remote: Remote) -> bool:
    with suppress(WireTooLarge):
        return bool(remote.ask(wire.Probe(wire.next_id(), wire.PROBE_BYTES), wire.Probed, timeout=10))
    return False
