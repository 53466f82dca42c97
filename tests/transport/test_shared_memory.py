"""Memory that both ends of a connection share: who gets it, that messages stay what they are, and who lies about it."""

from __future__ import annotations

import gc
import os
import random
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from time import monotonic

import pytest

from mesh_core.errors import ConfigError, PeerLost, WireMalformed
from mesh_core.testing.listeners import ListenerThread, ask
from mesh_core.testing.workers import wait_until
from mesh_core.transport import memory_link
from mesh_core.transport.base import Address, Channel, Listener, Peer, UnfitMessage
from mesh_core.transport.memory_link import NAME, SWITCH
from mesh_core.transport.shared_memory import SLOTS, SharedMemory
from mesh_core.transport.slots import SlotPlace, SlotReader, SlotWriter
from mesh_core.transport.zeromq import ZeroMqTransport

from .conftest import LOOPBACK, Bench

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has memory without a name")

ROOM = 1 << 20
LARGE = 200 << 10
"""Bytes of a frame that goes through the memory."""


def settled(channel: Channel) -> Channel:
    """Once the offer is answered."""
    assert ask(channel, [b"hello"]) == [b"hello"]
    return channel


def test_the_same_user_shares_memory_and_whoever_has_other_keys_does_not(bench: Bench) -> None:
    serving = bench.serve(bench.mesh(), LOOPBACK)
    owner, guest = bench.keys("owner"), bench.keys("guest")
    owner.authorise(guest.identity().client.public, "guest")
    address = Address(serving.address.text, owner.identity().server.public)
    for user, way in (("owner", NAME), ("guest", "")):
        channel = settled(bench.connect(bench.mesh(user), address))
        assert channel.way == way
        frame = random.Random(0).randbytes(LARGE)
        assert ask(channel, [b"header", frame])[1] == frame


def test_a_guest_who_offers_memory_all_the_same_is_declined(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = bench.serve(bench.mesh(), LOOPBACK)
    bench.keys("owner").authorise(bench.keys("guest").identity().client.public, "guest")
    monkeypatch.setattr("mesh_core.transport.zmq_connecting.Caller._own", lambda *_: True)
    address = Address(serving.address.text, bench.keys("owner").identity().server.public)
    channel = settled(bench.connect(bench.mesh("guest"), address))
    assert channel.way == ""
    assert ask(channel, [b"header", bytes(LARGE)])[1] == bytes(LARGE)


def test_without_encryption_nobody_has_proven_anything(bench: Bench) -> None:
    serving = bench.serve(bench.mesh(), LOOPBACK, insecure=True)
    assert settled(bench.connect(bench.mesh(), serving.address)).way == ""


def test_either_end_may_want_none(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = bench.serve(bench.mesh(shared=0), LOOPBACK)
    assert settled(bench.connect(bench.mesh(), plain.address)).way == ""
    sharing = bench.serve(bench.mesh(), LOOPBACK)
    monkeypatch.setenv(SWITCH, "0")
    assert settled(bench.connect(bench.mesh(), sharing.address)).way == ""
    monkeypatch.setenv(SWITCH, "many")
    with pytest.raises(ConfigError, match="many"):
        bench.connect(bench.mesh(), sharing.address)


def test_a_worker_that_knows_nothing_of_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the offer for a message, and answers something."""
    monkeypatch.setattr("mesh_core.transport.memory_link.MemoryLinks.answer", lambda *_: None)
    serving = bench.serve(bench.mesh(), LOOPBACK, answer=lambda listener, peer, _: listener.send(peer.route, [b"no"]))
    channel = bench.connect(bench.mesh(), serving.address)
    assert ask(channel, [b"x"]) == [b"no"]
    assert channel.receive(0.05) is None and channel.way == ""


def test_more_is_on_its_way_than_there_is_room_for(bench: Bench) -> None:
    """Nobody waits: what finds no room crosses the socket, in its place of the order; room that is free is used."""
    kept: list[list[memoryview]] = []
    serving = bench.serve(bench.mesh(shared=ROOM), LOOPBACK, answer=lambda _, peer, frames: kept.append(frames))
    channel = bench.connect(bench.mesh(shared=ROOM), serving.address)
    frames = [random.Random(n).randbytes(LARGE) for n in range(20)]
    for again in range(3):
        for frame in frames:
            channel.send([b"header", frame])
        wait_until(lambda: len(kept) == len(frames), what="all messages")
        assert [bytes(message[1]) for message in kept] == frames, again
        kept.clear()
        gc.collect()


def test_large_and_small_messages_of_many_threads_and_peers(bench: Bench) -> None:
    """Every channel gets what belongs to it, in order, while answers come from another thread."""
    waiting: SimpleQueue[tuple[Listener, Peer, list[memoryview]] | None] = SimpleQueue()

    def compute() -> None:
        while (got := waiting.get()) is not None:
            listener, peer, frames = got
            listener.send(peer.route, frames)

    thread = threading.Thread(target=compute)
    thread.start()
    transport = bench.mesh(shared=ROOM)
    serving = bench.serve(transport, LOOPBACK, answer=lambda *got: waiting.put(got))
    failed: list[BaseException] = []

    def talk(seed: int, channel: Channel) -> None:
        try:
            dice = random.Random(seed)
            for _ in range(30):
                sent = [[b"%d" % seed, dice.randbytes(dice.choice((1, 70_000, 400_000)))] for _ in range(4)]
                for message in sent:
                    channel.send(message)
                for message in sent:
                    got = channel.receive(20)
                    assert got is not None and [bytes(frame) for frame in got] == message
        except BaseException as error:
            failed.append(error)

    talking = [threading.Thread(target=talk, args=(n, bench.connect(transport, serving.address))) for n in range(4)]
    for one in talking:
        one.start()
    for one in talking:
        one.join(60)
    waiting.put(None)
    thread.join(10)
    assert not failed, failed[0]


def test_what_was_received_outlives_both_ends(bench: Bench) -> None:
    serving = bench.serve(bench.mesh(), LOOPBACK)
    channel = settled(bench.connect(bench.mesh(), serving.address))
    channel.send([b"header", b"a" * LARGE])
    got = channel.receive(10)
    assert got is not None and channel.way == NAME
    channel.close()
    serving.stop()
    del channel
    gc.collect()
    assert bytes(got[1]) == b"a" * LARGE
    got[1][0] = 1


def test_a_worker_started_again_shares_anew(bench: Bench) -> None:
    serving = bench.serve(bench.mesh(), LOOPBACK)
    channel = settled(bench.connect(bench.mesh(), serving.address))
    serving.stop()
    with pytest.raises(PeerLost):
        channel.receive(10)
    again = bench.serve(bench.mesh(), serving.address.text)
    assert settled(bench.connect(bench.mesh(), again.address)).way == NAME


def test_memory_of_closed_connections_is_let_go(bench: Bench) -> None:
    before = mappings()
    serving = bench.serve(bench.mesh(), LOOPBACK)
    for _ in range(3):
        channel = settled(bench.connect(bench.mesh(), serving.address))
        assert ask(channel, [b"header", bytes(LARGE)]) and channel.way == NAME
        assert mappings() > before
        channel.close()
    del channel
    wait_until(lambda: (serving.listener.wake(), gc.collect(), mappings() == before)[-1], 8, "memory to be let go")


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:comfyui-mesh")


# Who lies about places in the memory.

PLACED, HEAD = memory_link._MESSAGE, b"header"


def rows(*places: tuple[int, int, int, int, int]) -> bytes:
    return PLACED + b"".join(struct.pack("<HHQQQ", *place) for place in places)


LIES = {
    "beyond the end": (rows((1, 9, 1, ROOM, 1)), HEAD),
    "across the end": (rows((1, 9, 1, ROOM - 5, 10)), HEAD),
    "so far that numbers overflow": (rows((1, 9, 1, 2**64 - 1, 2)), HEAD),
    "more than there is": (rows((1, 9, 1, 0, ROOM + 1)), HEAD),
    "more than any message": (rows((1, 9, 1, 0, 2**63)), HEAD),
    "nothing": (rows((1, 9, 1, 0, 0)), HEAD),
    "in no slot": (rows((1, SLOTS, 1, 0, 1)), HEAD),
    "a use that never was": (rows((1, 9, 0, 0, 1)), HEAD),
    "the slot twice": (rows((1, 9, 1, 0, 1), (2, 9, 1, 0, 1)), HEAD),
    "the header": (rows((0, 9, 1, 0, 1)), HEAD),
    "the frame twice": (rows((1, 9, 1, 0, 1), (1, 8, 1, 0, 1)), HEAD),
    "a frame that is not there": (rows((7, 9, 1, 0, 1)), HEAD),
    "half of a row": (rows((1, 9, 1, 0, 1))[:-3], HEAD),
    "no rows": (PLACED, HEAD),
    "without a header": (rows((1, 9, 1, 0, 1)),),
    "rows without end": (rows(*((n, n % SLOTS, 1, 0, 1) for n in range(1, 400))), HEAD),
}


@contextmanager
def refusing(bench: Bench) -> Iterator[tuple[ListenerThread, list[WireMalformed]]]:
    """A listener that echoes, and notes what it cannot hand out."""
    refused: list[WireMalformed] = []
    listener = bench.mesh(shared=ROOM).listen(LOOPBACK)
    take: Callable[[float], tuple[Peer, list[memoryview]] | None] = listener.receive

    def receive(timeout: float) -> tuple[Peer, list[memoryview]] | None:
        try:
            return take(timeout)
        except UnfitMessage as unfit:
            refused.append(unfit.error)
            return None

    listener.receive = receive  # type: ignore[method-assign]
    serving = ListenerThread(listener)
    yield serving, refused
    serving.stop()


@pytest.mark.parametrize("lie", LIES)
def test_a_host_that_lies_is_refused_and_disturbs_nobody(bench: Bench, lie: str) -> None:
    with refusing(bench) as (serving, refused):
        honest = settled(bench.connect(bench.mesh(shared=ROOM), serving.address))
        liar = settled(bench.connect(bench.mesh(shared=ROOM), serving.address))
        assert liar.way == NAME
        liar._wire.send(liar.socket, [memoryview(frame) for frame in LIES[lie]])  # type: ignore[attr-defined]
        wait_until(lambda: refused, what="the refusal")
        assert "shared memory" in refused[0].message or "slot" in refused[0].message
        for channel in (honest, liar):
            assert ask(channel, [b"header", b"a" * LARGE])[1] == b"a" * LARGE
        assert len(refused) == 1


def test_places_in_memory_that_is_not_shared(bench: Bench) -> None:
    with refusing(bench) as (serving, refused):
        channel = settled(bench.connect(bench.mesh(shared=0), serving.address))
        channel.send([rows((1, 0, 1, 0, 1)), HEAD])
        wait_until(lambda: refused, what="the refusal")
        assert "none is shared" in refused[0].message


@pytest.mark.parametrize("lie", LIES)
def test_a_worker_that_lies_is_lost(bench: Bench, lie: str) -> None:
    serving = bench.serve(bench.mesh(shared=ROOM), LOOPBACK)
    channel = settled(bench.connect(bench.mesh(shared=ROOM), serving.address))
    links = serving.listener._memories  # type: ignore[attr-defined]
    links.close()
    serving.listener.send(serving.peers[-1].route, [bytes(frame) for frame in LIES[lie]])
    with pytest.raises(PeerLost, match="lies about the memory"):
        channel.receive(10)
    with pytest.raises(PeerLost):
        channel.send([b"x"])


# Who lies about the memory itself.


def a_file(folder: Path) -> tuple[int, int]:
    return os.open(folder / "file", os.O_RDWR | os.O_CREAT), ROOM


def a_pipe(folder: Path) -> tuple[int, int]:
    return os.pipe()[0], ROOM


def unsealed(folder: Path) -> tuple[int, int]:
    number = os.memfd_create("comfyui-mesh", os.MFD_ALLOW_SEALING)
    os.ftruncate(number, 8192 + 2 * ROOM)
    return number, ROOM


def another_size(folder: Path) -> tuple[int, int]:
    return keep(SharedMemory.make(ROOM)).number, 2 * ROOM


def too_large(folder: Path) -> tuple[int, int]:
    return keep(SharedMemory.make(ROOM)).number, 1 << 40


def odd(folder: Path) -> tuple[int, int]:
    return keep(SharedMemory.make(ROOM)).number, ROOM + 1


def nothing(folder: Path) -> tuple[int, int]:
    return 1 << 20, ROOM


KEPT: list[SharedMemory] = []


def keep(memory: SharedMemory) -> SharedMemory:
    KEPT.append(memory)
    return memory


@pytest.mark.parametrize("what", [a_file, a_pipe, unsealed, another_size, too_large, odd, nothing])
def test_an_offer_of_something_else_is_declined(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: Callable[[Path], tuple[int, int]]
) -> None:
    offer = memory_link.MemoryOffer

    def lying(room: int) -> memory_link.MemoryOffer:
        made, (number, said) = offer(room), what(tmp_path)
        made.frames = [memoryview(memory_link._OFFER + struct.pack("<IIQ", os.getpid(), number, said))]
        return made

    monkeypatch.setattr(memory_link, "MemoryOffer", lying)
    serving = bench.serve(bench.mesh(), LOOPBACK)
    channel = settled(bench.connect(bench.mesh(), serving.address))
    assert channel.way == ""
    assert ask(channel, [b"header", bytes(LARGE)])[1] == bytes(LARGE)
    KEPT.clear()


def test_a_worker_that_did_not_see_the_memory_is_not_believed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that only says that it took it, as one on another machine could."""
    monkeypatch.setattr("mesh_core.transport.memory_link.MemoryLinks._take", lambda *_: bytes(32))
    serving = bench.serve(bench.mesh(), LOOPBACK)
    assert settled(bench.connect(bench.mesh(), serving.address)).way == ""


def test_offers_are_taken_up_to_a_number(bench: Bench) -> None:
    transport: ZeroMqTransport = bench.mesh(shared=ROOM)
    serving = bench.serve(transport, LOOPBACK)
    channels = [settled(bench.connect(transport, serving.address)) for _ in range(66)]
    assert [channel.way for channel in channels] == [NAME] * 64 + [""] * 2


# One direction by itself.


def test_slots_are_given_back_with_the_last_view_and_used_again() -> None:
    memory = SharedMemory.make(ROOM)
    there = SharedMemory.open(os.getpid(), memory.number, ROOM)
    writer, reader = SlotWriter(memory, 0), SlotReader(there, 0)
    quarter = memoryview(bytes(ROOM // 4))
    first, second = writer.put(quarter), writer.put(quarter)
    assert first is not None and second is not None and (first.offset, second.offset) == (0, ROOM // 4)
    kept = reader.take(first)
    part, _ = kept[5:10], reader.take(second)
    del kept, _
    third = writer.put(quarter)
    assert third == SlotPlace(second.slot, second.use + 1, ROOM // 4, ROOM // 4)
    del part
    fourth = writer.put(quarter)
    assert fourth is not None and fourth.offset == 0


def test_whoever_keeps_much_leaves_half_of_the_room_to_the_sender() -> None:
    memory = SharedMemory.make(ROOM)
    writer, reader = SlotWriter(memory, 0), SlotReader(SharedMemory.open(os.getpid(), memory.number, ROOM), 0)
    kept = []
    for n in range(12):
        place = writer.put(memoryview(bytes([n]) * (ROOM // 4)))
        assert place is not None, n
        kept.append(reader.take(place))
    assert [view[0] for view in kept] == list(range(12))


def test_a_system_without_memory_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SharedMemory.make(ROOM)
    monkeypatch.setattr(SharedMemory, "reserve", lambda *_: False)
    assert SlotWriter(memory, 0).put(memoryview(bytes(LARGE))) is None


def test_nobody_waits_long_for_a_worker_that_is_silent(bench: Bench) -> None:
    """The offer is not waited for: a worker that reads nothing costs no time here."""
    listener = bench.mesh().listen(LOOPBACK)
    began = monotonic()
    channel = bench.connect(bench.mesh(), Address(listener.address))
    channel.send([b"header", bytes(LARGE)])
    assert channel.receive(0) is None
    assert monotonic() - began < 5
    channel.close()
    listener.close()
