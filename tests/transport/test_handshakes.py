"""How a connection to a worker begins: whose keys are taken, and what is concluded where nothing is proven."""

from __future__ import annotations

import socket
from time import monotonic

import pytest

from mesh_core.errors import NotAuthorised, Unreachable
from mesh_core.testing.listeners import ask
from mesh_core.transport.address import parse_place
from mesh_core.transport.base import Address
from mesh_core.transport.curve import new_key_pair
from mesh_core.transport.keys import KnownWorker
from mesh_core.transport.zmq_refusals import broken_off
from tests.support.net import cut_after, relayed

from .conftest import LOOPBACK, Bench


def test_an_unknown_key_is_refused_by_name_and_at_once(bench: Bench) -> None:
    serving = bench.serve(bench.mesh(), LOOPBACK)
    worker_key = bench.keys("owner").identity().server.public
    before = monotonic()
    with pytest.raises(NotAuthorised, match="does not accept this key"):
        bench.mesh("stranger").connect(Address(serving.address.text, worker_key), 10)
    assert monotonic() - before < 5
    assert not serving.peers


def test_a_worker_that_proves_another_known_key_is_refused_by_name(bench: Bench) -> None:
    serving, guest = bench.serve(bench.mesh(), LOOPBACK), bench.keys("guest")
    netloc = serving.address.text.partition("://")[2]
    guest.remember(KnownWorker(netloc, new_key_pair()[0], "blue"))
    guest.remember(KnownWorker("192.0.2.1:7777", bench.keys("owner").identity().server.public, "red"))
    with pytest.raises(NotAuthorised, match=r"another key .*that of red \(mesh://192.0.2.1:7777\)") as caught:
        bench.mesh("guest").connect(serving.address, 10)
    assert f"mesh keys forget {netloc}" in caught.value.hint


def test_of_a_key_that_nobody_has_proven_nothing_is_concluded(bench: Bench) -> None:
    """A worker that was set up anew breaks off without a word, and so does a bad link."""
    serving = bench.serve(bench.mesh(), LOOPBACK)
    bench.keys("guest").remember(KnownWorker(serving.address.text.partition("://")[2], new_key_pair()[0], "blue"))
    with pytest.raises(Unreachable, match="handshakes off") as caught:
        bench.mesh("guest").connect(serving.address, 1)
    assert "mesh keys list" in caught.value.hint and "forget" not in caught.value.hint


def test_a_worker_that_was_never_joined_is_told_as_that(bench: Bench) -> None:
    serving = bench.serve(bench.mesh(), LOOPBACK)
    with pytest.raises(Unreachable, match="was ever joined") as caught:
        bench.mesh("guest").connect(serving.address, 1)
    assert "mesh join INVITE" in caught.value.hint and "forget" not in caught.value.hint


@pytest.mark.parametrize(
    ("address", "what"), [("mesh://blue:1", "handshake"), ("mesh://blue:1?insecure=yes", "connection")]
)
def test_how_often_it_broke_is_told_as_people_count(address: str, what: str) -> None:
    place = parse_place(address)
    assert f"broke 1 {what} off" in str(broken_off(place, 1, "given"))
    assert f"broke 2 {what}s off" in str(broken_off(place, 2, "given"))


HANDSHAKE = [(there, cut) for there in (True, False) for cut in (0, 1, 9, 10, 11, 12, 63, 64, 66, 200, 231, 263)]
"""Where a handshake is cut: a greeting has 64 bytes, of which the first 10 are a signature; hello 202, welcome 170."""


@pytest.mark.parametrize(("there", "cut"), HANDSHAKE)
def test_a_handshake_that_breaks_is_neither_another_key_nor_the_end(bench: Bench, there: bool, cut: int) -> None:
    serving, transport = bench.serve(bench.mesh(), LOOPBACK), bench.mesh("guest")
    bench.keys("owner").authorise(bench.keys("guest").identity().client.public, "guest")
    key = bench.keys("owner").identity().server.public
    # Every second connection only asks whether anybody listens.
    with relayed(serving.address.text, cut_after(cut, there=there, spared=lambda number: number > 3)) as address:
        assert ask(bench.connect(transport, Address(address, key)), [b"x"]) == [b"x"]
    with relayed(serving.address.text, cut_after(cut, there=there)) as address:
        with pytest.raises(Unreachable, match="broke"):
            transport.connect(Address(address, key), 0.2)


def test_a_worker_that_starts_anew_during_the_handshake_is_waited_for(bench: Bench) -> None:
    serving, key = bench.serve(bench.mesh(), LOOPBACK), bench.keys("owner").identity().server.public
    bench.keys("owner").authorise(bench.keys("guest").identity().client.public, "guest")

    def carry(source: socket.socket, target: socket.socket, number: int, there: bool) -> None:
        if number == 1 and there:
            cut_after(100, there=True)(source, target, number, there)
            serving.stop()
            bench.serve(bench.mesh(), serving.address.text)
        else:
            cut_after(1 << 30, there=there)(source, target, number, there)

    with relayed(serving.address.text, carry) as address:
        assert ask(bench.connect(bench.mesh("guest"), Address(address, key)), [b"x"]) == [b"x"]
