"""For authors of transports: what every transport must prove, in the same words for all of them.

The contract itself is in `mesh_core.transport.base`.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import TypeVar

from mesh_core.errors import ConfigError, MeshError, PeerLost, TransportError, Unreachable, WireTooLarge
from mesh_core.testing.listeners import Answer, ListenerThread, TransportRig, ask, echo
from mesh_core.testing.workers import wait_until
from mesh_core.transport.base import Address, Channel, Frame, Listener, Peer, Transport
from mesh_core.wire.limits import LIMITS, MessageLimits

MakeTransport = Callable[[MessageLimits], Transport]
"""A new transport that keeps to these limits."""

_MIB = 1 << 20
_Refusal = TypeVar("_Refusal", bound=MeshError)


@dataclass
class TransportCase:
    """A transport in one check.

    Attributes:
        make: makes another one, with other limits.
        address: where to listen so that the system chooses the rest.
        rig: closes what the check starts.
    """

    make: MakeTransport
    address: str
    rig: TransportRig
    transport: Transport = field(init=False)

    def __post_init__(self) -> None:
        self.transport = self.rig.owns(self.make(LIMITS))

    def serve(self, answer: Answer = echo) -> ListenerThread:
        """Listen at `address`."""
        return self.rig.serve(self.transport, self.address, answer)

    def connect(self, thread: ListenerThread, timeout: float = 5) -> Channel:
        """A channel to a listener."""
        return self.rig.connect(self.transport, thread.address, timeout)


Check = Callable[[TransportCase], None]


def check_transport(make: MakeTransport, address: str, only: Check | None = None) -> None:
    """Run all of `TRANSPORT_CHECKS`, each with a transport of its own, or one of them.

    Args:
        make: makes a transport that refuses frames over the given limits; it is closed if it has a ``close``.
        address: where to listen so that the system chooses the rest, as ``mesh://127.0.0.1:0`` does.

    Raises:
        AssertionError: the transport does not do what `mesh_core.transport.base` says.
    """
    for check in TRANSPORT_CHECKS if only is None else (only,):
        with TransportRig() as rig:
            check(TransportCase(make, address, rig))


def check_frames_come_back_as_they_were_sent(case: TransportCase) -> None:
    """Empty frames, and all types that a frame may have, of any element size."""
    channel = case.connect(case.serve())
    frames: list[Frame] = [b"header", b"", bytearray(b"abc"), memoryview(b"12345678").cast("H"), b"x" * 100_000]
    _equal(ask(channel, frames), [bytes(f) for f in frames], "the frames that came back")


def check_large_frames_arrive_whole(case: TransportCase) -> None:
    """Up to 33 MiB, and about the sizes at which a transport may cut a message into parts."""
    channel = case.connect(case.serve())
    for size in (_MIB - 1, _MIB, _MIB + 1, 3 * _MIB, 33 * _MIB + 5):
        pattern = bytes(range(251)) * (size // 251 + 1)
        sent = memoryview(bytearray(pattern[:size]))
        channel.send([b"header", sent, b"end"])
        header, large, end = _received(channel, 3, timeout=20)
        assert (bytes(header), bytes(end)) == (b"header", b"end"), f"the frames around one of {size} bytes are others"
        assert large == sent, f"a frame of {size} bytes is another"


def check_received_views_stay_valid_and_can_be_written(case: TransportCase) -> None:
    """What was received is the receiver's: later messages do not change it."""
    channel = case.connect(case.serve())
    channel.send([b"header", bytearray(b"a" * 70_000)])
    _, kept = _received(channel, 2)
    for letter in b"bcdefgh":
        ask(channel, [b"header", bytes([letter]) * 70_000])
    gc.collect()
    assert bytes(kept) == b"a" * 70_000, "a later message changed what was received"
    assert not kept.readonly, "a received view cannot be written"
    kept[0] = 1


def check_messages_keep_their_order(case: TransportCase) -> None:
    """Small ones do not overtake large ones."""
    channel = case.connect(case.serve())
    sizes = [10, 200_000, 1, 2 * _MIB, 5]
    for number, size in enumerate(sizes):
        channel.send([bytes([number]), bytearray(size)])
    for number, size in enumerate(sizes):
        head, body = _received(channel, 2)
        _equal((head[0], len(body)), (number, size), "number and size of a message")


def check_each_of_many_peers_gets_its_own_answers(case: TransportCase) -> None:
    """Twelve channels at once, each with a route of its own."""
    serving = case.serve()
    channels = [case.connect(serving) for _ in range(12)]
    for round_ in range(5):
        for number, channel in enumerate(channels):
            channel.send([bytes([number, round_])])
    for number, channel in enumerate(channels):
        answers = [channel.receive(10) for _ in range(5)]
        _equal(answers, [[bytes([number, round_])] for round_ in range(5)], f"the answers to channel {number}")
    _equal(len({peer.route for peer in serving.peers}), len(channels), "the number of routes")


def check_other_threads_answer_in_order_while_the_listener_waits(case: TransportCase) -> None:
    """`Listener.send` from several threads: nothing is lost, and each one's answers keep their order."""

    def from_threads(listener: Listener, peer: Peer, frames: list[memoryview]) -> None:
        def work(number: int) -> None:
            for count in range(50):
                listener.send(peer.route, [bytes([number, count]), bytearray(70_000 if count == 25 else 1)])

        for number in range(3):
            threading.Thread(target=work, args=(number,)).start()

    channel = case.connect(case.serve(from_threads))
    channel.send([b"go"])
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for _ in range(150):
        head, _body = _received(channel, 2)
        seen[head[0]].append(head[1])
    for number, counts in seen.items():
        _equal(counts, list(range(50)), f"the answers of thread {number}")


def check_nothing_to_receive_is_none_after_the_timeout(case: TransportCase) -> None:
    """Neither earlier, nor an error."""
    channel = case.connect(case.serve())
    before = monotonic()
    assert channel.receive(0.05) is None, "a message that nobody sent"
    assert monotonic() - before >= 0.05, "receive() returned before its timeout"
    assert channel.receive(0) is None, "a message that nobody sent"


def check_wake_ends_a_wait_once(case: TransportCase) -> None:
    """`Listener.wake` from another thread ends the running `Listener.receive`, and not the next one too."""
    with closing(case.transport.listen(case.address)) as listener:
        threading.Timer(0.05, listener.wake).start()
        before = monotonic()
        assert listener.receive(20) is None, "a message that nobody sent"
        assert monotonic() - before < 15, "wake() did not end receive()"
        before = monotonic()
        assert listener.receive(0.05) is None, "a message that nobody sent"
        assert monotonic() - before >= 0.05, "one wake() ended two waits"


def check_wait_names_the_channels_that_have_something(case: TransportCase) -> None:
    """`Transport.wait`: those that have, none after the timeout, none when all was received."""
    serving, wait = case.serve(), case.transport.wait
    channels = [case.connect(serving) for _ in range(3)]
    _equal(wait(channels, 0.02), [], "the channels that have something, before anything was sent")
    channels[1].send([b"x"])
    _equal(wait(channels, 10), [channels[1]], "the channels that have something")
    _equal(channels[1].receive(0), [b"x"], "what wait() promised")
    _equal(wait(channels, 0), [], "the channels that have something, after it was received")


def check_a_worker_that_ends_is_a_lost_peer_after_its_last_answer(case: TransportCase) -> None:
    """`PeerLost` from wait, receive and send; what came before is received first."""
    serving = case.serve()
    channel = case.connect(serving)
    channel.send([b"last"])
    while not case.transport.wait([channel], 10):
        pass
    _equal(channel.receive(0), [b"last"], "the last answer")
    serving.stop()
    _equal(case.transport.wait([channel], 10), [channel], "the channels that have an error to raise")
    _refused(PeerLost, lambda: channel.receive(10))
    _refused(PeerLost, lambda: channel.send([b"x"]))


def check_a_closed_channel_says_so_and_its_answers_are_dropped(case: TransportCase) -> None:
    """Closed twice, used after it; answers to it, and to a route that never was, are no error at the listener."""
    later: list[Peer] = []
    serving = case.serve(lambda listener, peer, frames: later.append(peer))
    gone, staying = case.connect(serving), case.connect(serving)
    gone.send([b"x"])
    wait_until(lambda: later, what="a message at the listener")
    gone.close()
    gone.close()
    _refused(PeerLost, lambda: gone.receive(0))
    _refused(PeerLost, lambda: gone.send([b"x"]))
    serving.listener.send(later[0].route, [b"to nobody"])
    serving.listener.send(b"a route that never was", [b"to nobody"])
    staying.send([b"y"])
    wait_until(lambda: len(later) == 2, what="a message of the other channel")
    serving.listener.send(later[1].route, [b"z"])
    _equal(staying.receive(10), [b"z"], "the answer to the other channel")


def check_nobody_at_the_address_is_unreachable(case: TransportCase) -> None:
    """`Unreachable`, soon after the timeout."""
    serving = case.serve()
    serving.stop()
    before = monotonic()
    _refused(Unreachable, lambda: case.connect(serving, timeout=0.2))
    assert monotonic() - before < 5, "connect() took far longer than its timeout"


def check_connecting_waits_for_a_worker_that_starts_late(case: TransportCase) -> None:
    """A worker that listens within the timeout is reached."""
    serving = case.serve()
    serving.stop()
    late = threading.Timer(0.3, lambda: case.rig.serve(case.transport, serving.address.text))
    late.start()
    channel = case.connect(serving, timeout=10)
    late.join()
    _equal(ask(channel, [b"x"]), [b"x"], "the answer")


def check_an_address_is_used_once(case: TransportCase) -> None:
    """The error for a second listener names the address, and what to do."""
    serving = case.serve()
    error = _refused(TransportError, lambda: case.transport.listen(serving.address.text))
    place = serving.address.text.partition("?")[0].rpartition("/")[2]
    assert place in str(error), f"the error does not name {place}: {error}"
    assert error.hint, "the error has no hint"


def check_an_unknown_option_is_refused(case: TransportCase) -> None:
    """`ConfigError` that names the option."""
    error = _refused(ConfigError, lambda: case.transport.listen(case.address, speed=9))
    assert "speed" in str(error), f"the error does not name the option: {error}"


def check_a_frame_over_the_limit_is_refused_before_it_is_sent(case: TransportCase) -> None:
    """At both ends, whoever it is for; the connection is good for the next message."""
    transport = case.rig.owns(case.make(replace(LIMITS, buffer=2000)))
    serving = case.rig.serve(transport, case.address)
    channel = case.rig.connect(transport, Address(serving.address.text))
    _refused(WireTooLarge, lambda: channel.send([b"header", bytearray(2001)]))
    _refused(WireTooLarge, lambda: serving.listener.send(b"anybody", [bytearray(2001)]))
    _equal(ask(channel, [b"header", bytearray(2000)])[1], bytes(2000), "a frame of exactly the limit")


TRANSPORT_CHECKS: tuple[Check, ...] = (
    check_frames_come_back_as_they_were_sent,
    check_large_frames_arrive_whole,
    check_received_views_stay_valid_and_can_be_written,
    check_messages_keep_their_order,
    check_each_of_many_peers_gets_its_own_answers,
    check_other_threads_answer_in_order_while_the_listener_waits,
    check_nothing_to_receive_is_none_after_the_timeout,
    check_wake_ends_a_wait_once,
    check_wait_names_the_channels_that_have_something,
    check_a_worker_that_ends_is_a_lost_peer_after_its_last_answer,
    check_a_closed_channel_says_so_and_its_answers_are_dropped,
    check_nobody_at_the_address_is_unreachable,
    check_connecting_waits_for_a_worker_that_starts_late,
    check_an_address_is_used_once,
    check_an_unknown_option_is_refused,
    check_a_frame_over_the_limit_is_refused_before_it_is_sent,
)


def _received(channel: Channel, frames: int, timeout: float = 10) -> Sequence[memoryview]:
    message = channel.receive(timeout)
    assert message is not None, f"no message within {timeout:.0f} s"
    assert len(message) == frames, f"a message of {len(message)} frames instead of {frames}"
    return message


def _equal(found: object, expected: object, what: str) -> None:
    assert found == expected, f"{what}: {found!r:.200} instead of {expected!r:.200}"


def _refused(kind: type[_Refusal], action: Callable[[], object]) -> _Refusal:
    try:
        action()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")
