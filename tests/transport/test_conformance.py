"""What every transport does, in the same words for all of them."""

from __future__ import annotations

import gc
import threading
from time import monotonic, sleep

import pytest

from mesh_core.errors import ConfigError, PeerLost, TransportError, Unreachable, WireTooLarge
from mesh_core.transport.base import Address, Listener, Peer
from mesh_core.transport.inproc import InprocTransport
from mesh_core.wire import Limits

from .conftest import Bench, Kind, ask

MIB = 1 << 20


def test_frames_come_back_as_they_were_sent(kind: Kind) -> None:
    channel = kind.connect(kind.serve())
    frames = [b"header", b"", bytearray(b"abc"), memoryview(b"12345678").cast("H"), b"x" * 100_000]
    assert ask(channel, list(frames)) == [bytes(f) for f in frames]


@pytest.mark.parametrize("size", [MIB - 1, MIB, MIB + 1, 3 * MIB, 33 * MIB + 5])
def test_large_frames_arrive_whole(kind: Kind, size: int) -> None:
    channel = kind.connect(kind.serve())
    pattern = bytes(range(251)) * (size // 251 + 1)
    sent = memoryview(bytearray(pattern[:size]))
    channel.send([b"header", sent, b"end"])
    header, large, end = channel.receive(20) or []
    assert (header, end) == (b"header", b"end")
    assert large == sent


def test_received_views_stay_valid_and_can_be_written(kind: Kind) -> None:
    channel = kind.connect(kind.serve())
    channel.send([b"header", bytearray(b"a" * 70_000)])
    _, kept = channel.receive(10) or []
    for letter in b"bcdefgh":
        ask(channel, [b"header", bytes([letter]) * 70_000])
    gc.collect()
    assert bytes(kept) == b"a" * 70_000
    kept[0] = 1


def test_messages_keep_their_order(kind: Kind) -> None:
    channel = kind.connect(kind.serve())
    sizes = [10, 200_000, 1, 2 * MIB, 5]
    for number, size in enumerate(sizes):
        channel.send([bytes([number]), bytearray(size)])
    for number, size in enumerate(sizes):
        head, body = channel.receive(10) or []
        assert (head[0], len(body)) == (number, size)


def test_each_of_many_peers_gets_its_own_answers(kind: Kind) -> None:
    serving = kind.serve()
    channels = [kind.connect(serving) for _ in range(12)]
    for round_ in range(5):
        for number, channel in enumerate(channels):
            channel.send([bytes([number, round_])])
    for number, channel in enumerate(channels):
        answers = [channel.receive(10) for _ in range(5)]
        assert answers == [[bytes([number, round_])] for round_ in range(5)]
    assert len({peer.route for peer in serving.peers}) == len(channels)


def test_other_threads_answer_in_order_while_the_listener_waits(kind: Kind) -> None:
    def from_threads(listener: Listener, peer: Peer, frames: list[memoryview]) -> None:
        def work(number: int) -> None:
            for count in range(50):
                listener.send(peer.route, [bytes([number, count]), bytearray(70_000 if count == 25 else 1)])

        for number in range(3):
            threading.Thread(target=work, args=(number,)).start()

    channel = kind.connect(kind.serve(from_threads))
    channel.send([b"go"])
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for _ in range(150):
        head, _body = channel.receive(10) or []
        seen[head[0]].append(head[1])
    assert all(counts == list(range(50)) for counts in seen.values())


def test_nothing_to_receive_is_none_after_the_timeout(kind: Kind) -> None:
    channel = kind.connect(kind.serve())
    before = monotonic()
    assert channel.receive(0.05) is None
    assert monotonic() - before >= 0.05
    assert channel.receive(0) is None


def test_wake_ends_a_wait_once(kind: Kind) -> None:
    listener = kind.transport.listen(kind.address)
    try:
        threading.Timer(0.05, listener.wake).start()
        before = monotonic()
        assert listener.receive(20) is None
        assert monotonic() - before < 15
        before = monotonic()
        assert listener.receive(0.05) is None
        assert monotonic() - before >= 0.05
    finally:
        listener.close()


def test_wait_names_the_channels_that_have_something(kind: Kind) -> None:
    serving = kind.serve()
    channels = [kind.connect(serving) for _ in range(3)]
    assert kind.transport.wait(channels, 0.02) == []
    channels[1].send([b"x"])
    assert kind.transport.wait(channels, 10) == [channels[1]]
    assert channels[1].receive(0) == [b"x"]
    assert kind.transport.wait(channels, 0) == []


def test_a_worker_that_ends_is_a_lost_peer_after_its_last_answer(kind: Kind) -> None:
    serving = kind.serve()
    channel = kind.connect(serving)
    channel.send([b"last"])
    while not kind.transport.wait([channel], 10):
        pass
    assert channel.receive(0) == [b"last"]
    serving.stop()
    assert kind.transport.wait([channel], 10) == [channel]
    with pytest.raises(PeerLost):
        channel.receive(10)
    with pytest.raises(PeerLost):
        channel.send([b"x"])


def test_a_closed_channel_says_so_and_its_answers_are_dropped(kind: Kind) -> None:
    later: list[Peer] = []
    serving = kind.serve(lambda listener, peer, frames: later.append(peer))
    gone, staying = kind.connect(serving), kind.connect(serving)
    gone.send([b"x"])
    while not later:
        sleep(0.005)
    gone.close()
    gone.close()
    with pytest.raises(PeerLost):
        gone.receive(0)
    with pytest.raises(PeerLost):
        gone.send([b"x"])
    serving.listener.send(later[0].route, [b"to nobody"])
    serving.listener.send(b"a route that never was", [b"to nobody"])
    staying.send([b"y"])
    while len(later) < 2:
        sleep(0.005)
    serving.listener.send(later[1].route, [b"z"])
    assert staying.receive(10) == [b"z"]


def test_nobody_at_the_address_is_unreachable(kind: Kind) -> None:
    serving = kind.serve()
    serving.stop()
    before = monotonic()
    with pytest.raises(Unreachable):
        kind.connect(serving, timeout=0.2)
    assert monotonic() - before < 5


def test_connecting_waits_for_a_worker_that_starts_late(kind: Kind) -> None:
    serving = kind.serve()
    serving.stop()
    late = threading.Timer(0.3, lambda: kind.bench.serve(kind.transport, serving.address.text))
    late.start()
    channel = kind.connect(serving, timeout=10)
    late.join()
    assert ask(channel, [b"x"]) == [b"x"]


def test_an_address_is_used_once(kind: Kind) -> None:
    serving = kind.serve()
    with pytest.raises(TransportError) as caught:
        kind.transport.listen(serving.address.text)
    assert serving.address.text.partition("?")[0].rpartition("/")[2] in str(caught.value)
    assert caught.value.hint


def test_an_unknown_option_is_refused(kind: Kind) -> None:
    with pytest.raises(ConfigError, match="speed"):
        kind.transport.listen(kind.address, speed=9)


@pytest.mark.parametrize("name", ["inproc", "mesh"])
def test_a_frame_over_the_limit_is_refused_before_it_is_sent(bench: Bench, name: str) -> None:
    small = Limits(buffer=2000)
    transport = InprocTransport(small) if name == "inproc" else bench.mesh(limits=small)
    serving = bench.serve(transport, "inproc://" if name == "inproc" else "mesh://127.0.0.1:0")
    channel = bench.connect(transport, Address(serving.address.text))
    with pytest.raises(WireTooLarge):
        channel.send([b"header", bytearray(2001)])
    with pytest.raises(WireTooLarge):
        serving.listener.send(b"anybody", [bytearray(2001)])
    assert ask(channel, [b"header", bytearray(2000)])[1] == bytes(2000)
