"""Connections are counted, so that files run out for nobody."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from time import sleep

import pytest

from mesh_core.errors import PeerLost
from mesh_core.testing.listeners import ask
from mesh_core.transport.base import Address
from mesh_core.transport.zeromq import ZeroMqTransport
from mesh_core.transport.zmq_doors import DoorLimits
from tests.support.workers import wait_until

from .conftest import LOOPBACK, Bench, port_of


@pytest.fixture
def few_files(monkeypatch: pytest.MonkeyPatch) -> DoorLimits:
    """The limits of listeners in a process that may have very little open."""
    monkeypatch.setattr("mesh_core.transport.zeromq.raised_limit", lambda: 64)
    return DoorLimits.within(64)


def is_open(end: socket.socket) -> bool:
    """Whether the other end of a connection without a handshake still keeps it."""
    end.settimeout(0.01)
    try:
        while end.recv(64):
            pass
    except TimeoutError:
        return True
    except OSError:
        pass
    return False


def test_of_connections_that_say_nothing_the_oldest_are_closed(bench: Bench, few_files: DoorLimits) -> None:
    serving = bench.serve(bench.mesh(), LOOPBACK)
    before = bench.connect(bench.mesh(), serving.address)
    with ExitStack() as held:
        ends = []
        for _ in range(40):
            ends.append(held.enter_context(socket.create_connection(("127.0.0.1", port_of(serving)))))
            sleep(0.005)
        wait_until(lambda: sum(map(is_open, ends)) <= few_files.of_address, 3, "closing")
        assert not any(map(is_open, ends[:20]))
        after = bench.connect(bench.mesh(), serving.address)
        assert ask(before, [b"x"]) == ask(after, [b"x"]) == [b"x"]


def test_one_key_has_so_many_connections_and_others_theirs(bench: Bench, few_files: DoorLimits) -> None:
    serving, guest = bench.serve(bench.mesh(), LOOPBACK), bench.mesh("guest")
    bench.keys("owner").authorise(bench.keys("guest").identity().client.public, "guest")
    address = Address(serving.address.text, bench.keys("owner").identity().server.public)
    channels = []
    for _ in range(few_files.of_key):
        channels.append(bench.connect(guest, address))
        assert ask(channels[-1], [b"x"]) == [b"x"]
    with pytest.raises(PeerLost):
        bench.connect(guest, address).receive(5)
    assert ask(bench.connect(bench.mesh(), serving.address), [b"x"]) == [b"x"]
    channels.pop().close()
    wait_until(lambda: _is_let_in(guest, address), 5, "room for another connection")


def _is_let_in(transport: ZeroMqTransport, address: Address) -> bool:
    channel = transport.connect(address, 5)
    try:
        return ask(channel, [b"x"]) == [b"x"]
    except PeerLost:
        return False
    finally:
        channel.close()
