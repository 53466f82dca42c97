"""What becomes of a state that was handed on is known within seconds, and told once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from time import monotonic, sleep
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from mesh_core import wire
from mesh_core.errors import MeshError, PeerLost, SessionUnknown, WireTooLarge
from mesh_core.system.config import Heartbeat
from mesh_core.transport.base import Address, Listener, Peer
from mesh_core.transport.inproc import InprocTransport
from mesh_core.wire.failure import describe
from mesh_core.worker.onward import Onward
from mesh_core.worker.steps import WorkerSteps
from tests.support.workers import wait_until

BEAT = Heartbeat(interval=0.05, lost_after=0.3)
SESSION = b"s" * 16


def step(number: int, deadline: float = 20.0) -> wire.Step:
    return wire.Step(number, SESSION, number, 1, 0, "", {}, {}, [], [], int(deadline * 1e3))


@dataclass
class Next:
    """The worker that continues, by hand."""

    listener: Listener
    pings: int = 0
    steps: list[int] = field(default_factory=list)
    route: bytes = b""

    def serve(self, *, answering: bool = True) -> None:
        while (got := self.listener.receive(0)) is not None:
            peer, frames = got
            message, _ = wire.unpack(frames)
            self.take(peer, message, answering)

    def take(self, peer: Peer, message: wire.Message, answering: bool) -> None:
        if isinstance(message, wire.Step):
            self.steps.append(message.step)
            self.route = peer.route
        elif isinstance(message, wire.Ping):
            self.pings += 1
            if answering:
                self.listener.send(peer.route, wire.pack(wire.Pong(message.id)))

    def refuse(self, id_: int, error: Exception) -> None:
        self.listener.send(self.route, wire.pack(wire.Failed(id_, SESSION, 0, worker="next", **describe(error))))


@pytest.fixture
def ends() -> Iterator[tuple[Onward, Next]]:
    transport = InprocTransport()
    listener = transport.listen("inproc://next")
    address = Address("inproc://next")
    onward = Onward("next", transport.connect(address, 1), transport.connect(address, 1), SESSION, BEAT)
    yield onward, Next(listener)
    onward.close()
    listener.close()


def test_a_worker_that_computes_long_is_pinged_and_is_not_lost(ends: tuple[Onward, Next]) -> None:
    onward, following = ends
    onward.hand_on(step(1), [])

    def alive() -> bool:
        following.serve()
        assert onward.look() is None
        sleep(0.01)
        return following.pings > 3 * BEAT.lost_after / BEAT.interval

    wait_until(alive, 20)
    assert following.steps == [1]


def test_silence_and_a_closed_connection_are_told_once_and_not_before_a_state_was_handed_on(
    ends: tuple[Onward, Next],
) -> None:
    onward, following = ends
    assert onward.look() is None
    onward.hand_on(step(1), [])
    told: list[object] = []
    wait_until(lambda: told.append(onward.look()) or told[-1], what="noticing the silence")
    assert isinstance(told[-1], tuple) and told[-1][0].step == 1 and isinstance(told[-1][1], PeerLost)
    assert "next" in told[-1][1].message and onward.look() is None
    onward.hand_on(step(2), [])
    following.listener.close()
    lost = onward.look()
    assert lost is not None and lost[0].step == 2 and isinstance(lost[1], PeerLost)
    assert onward.look() is None
    with pytest.raises(PeerLost):
        onward.hand_on(step(3), [])


@pytest.mark.parametrize("kind", [WireTooLarge, SessionUnknown])
def test_what_the_next_worker_refuses_is_told(ends: tuple[Onward, Next], kind: type[MeshError]) -> None:
    error = kind("what it says")
    onward, following = ends
    onward.hand_on(step(7), [])
    following.serve()
    following.refuse(6, error)
    assert onward.look() is None, "that was an earlier one"
    following.refuse(7, error)
    lost = onward.look()
    assert lost is not None and lost[0].step == 7 and type(lost[1]) is kind and "what it says" in str(lost[1])


def test_nobody_is_pinged_for_a_step_whose_deadline_is_over(ends: tuple[Onward, Next]) -> None:
    onward, following = ends
    onward.hand_on(step(1, deadline=0.0), [])
    sleep(2 * BEAT.interval)
    assert onward.look() is None
    following.serve()
    assert following.pings == 0


NOT_ASKED_FOR = {
    "a message of another kind": wire.pack(wire.LorasListed(1, [])),
    "a large one": wire.pack(wire.LorasListed(1, [{"a": [[] for _ in range(15)]} for _ in range(4095)])),
    "bytes": wire.pack(wire.Probed(1), [bytes(1 << 20)]),
    "nonsense": [b"\xc0"],
}


@pytest.mark.parametrize("on_the_pulse", [False, True])
@pytest.mark.parametrize("sent", NOT_ASKED_FOR.values(), ids=NOT_ASKED_FOR)
@pytest.mark.parametrize("under_way", [True, False])
def test_a_next_worker_that_sends_what_none_sends_is_lost_at_the_first_message(
    ends: tuple[Onward, Next], sent: list[bytes], on_the_pulse: bool, under_way: bool
) -> None:
    onward, following = ends
    onward.hand_on(step(1), [])
    assert onward.look() is None
    peers = {type(wire.unpack(frames)[0]): peer for peer, frames in (following.listener.receive(1) or () for _ in "12")}
    if not under_way:
        onward.hand_on(step(1, deadline=0.0), [])
        assert onward.look() is None
    for _ in range(50):
        following.listener.send(peers[wire.Ping if on_the_pulse else wire.Step].route, sent)
    lost = onward.look()
    if under_way:
        assert lost is not None and lost[0].step == 1 and isinstance(lost[1], PeerLost)
    else:
        assert lost is None
    assert onward.look() is None
    with pytest.raises(PeerLost):
        onward.hand_on(step(2), [])


def test_what_comes_between_steps_is_read_and_forgotten(ends: tuple[Onward, Next]) -> None:
    onward, following = ends
    onward.hand_on(step(1, deadline=0.0), [])
    following.serve()
    for _ in range(3):
        following.refuse(2, WireTooLarge("early"))
        assert onward.look() is None
    onward.hand_on(step(2), [])
    assert onward.look() is None, "that was no answer to what had not been sent"


def test_a_look_has_an_end_and_the_next_one_goes_on_where_it_stopped() -> None:
    class Slow:
        looked = 0.0

        def look(self) -> None:
            self.looked = monotonic()
            seen.append(self)
            sleep(0.01)

    seen: list[Slow] = []
    sessions: Any = [SimpleNamespace(next=Slow()) for _ in range(5)]
    steps = WorkerSteps("worker", torch.device("cpu"), 1.0, cast(Any, None), sessions, *[cast(Any, None)] * 3)
    for number in range(5):
        sleep(0.11)
        steps.report_losses()
        assert len(seen) == number + 1
    assert len(set(seen)) == 5
