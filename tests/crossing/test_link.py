"""A link is measured quickly whatever its speed, follows what crosses it, and believes nothing absurd."""

from __future__ import annotations

from typing import Any

import pytest

from mesh_core.crossing import bandwidth as link_module
from mesh_core.crossing.bandwidth import Link, measure, plain_link, read_link, updated

MBIT = 1e6 / 8


class Wire:
    """A connection in a time of its own. Bytes per second there and back."""

    def __init__(self, there: float, back: float, latency: float) -> None:
        self.there, self.back, self.latency = there, back, latency
        self.now, self.sent = 0.0, 0

    def exchange(self, there: int, back: int) -> None:
        self.now += self.latency + there / self.there + back / self.back
        self.sent += there + back


def measured(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> tuple[Link, Link]:
    monkeypatch.setattr(link_module, "perf_counter", lambda: wire.now)
    return measure(wire.exchange)


@pytest.mark.parametrize("latency", [1e-4, 2e-3])
@pytest.mark.parametrize("rate", [1, 10, 100, 1000, 2500, 10000])
def test_any_rate_is_found_in_a_third_of_a_second(rate: float, latency: float, monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(rate * MBIT, rate * MBIT, latency)
    there, back = measured(wire, monkeypatch)
    for found in (there, back):
        assert found.bandwidth == pytest.approx(rate * MBIT, rel=0.15)
        assert found.latency == pytest.approx(latency)
    assert wire.now < 0.33 and wire.sent < 10e6


def test_directions_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    there, back = measured(Wire(20 * MBIT, 500 * MBIT, 0.01), monkeypatch)
    assert there.bandwidth == pytest.approx(20 * MBIT, rel=0.1) and back.bandwidth == pytest.approx(500 * MBIT, rel=0.1)


def test_a_link_that_is_all_latency_is_still_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    there, _ = measured(Wire(1e15, 1e15, 0.05), monkeypatch)
    assert 1e6 < there.bandwidth <= 1e12 and there.latency == pytest.approx(0.05)


def after(link: Link, rate: float, steps: int, nbytes: int = 4 << 20) -> Link:
    for _ in range(steps):
        (link,) = updated([(link, nbytes)], link.latency / 2 + nbytes / rate)
    return link


@pytest.mark.parametrize("factor", [0.05, 0.2, 5, 20])
def test_steps_tell_when_a_link_changes(factor: float) -> None:
    link = Link(100e6, 1e-3)
    assert after(link, 100e6, 5).bandwidth == pytest.approx(100e6, rel=0.01)
    assert after(link, factor * 100e6, 6).bandwidth == pytest.approx(factor * 100e6, rel=0.2)


def test_one_strange_step_is_not_believed_in_full() -> None:
    link = after(Link(100e6, 1e-3), 1e3, 1)
    assert 100e6 / 20 < link.bandwidth < 100e6 / 2
    assert after(link, 100e6, 4).bandwidth == pytest.approx(100e6, rel=0.1)


def test_what_takes_most_of_the_time_takes_the_blame() -> None:
    up, down = Link(50e6, 1e-3), Link(50e6, 1e-3)
    for _ in range(8):
        up, down = updated([(up, 10_000_000), (down, 100_000)], 2.0)
    assert up.bandwidth == pytest.approx(5e6, rel=0.2) and down.bandwidth > 40e6


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_times_that_cannot_be_are_no_news(seconds: float) -> None:
    link = Link(1e8, 1e-3)
    assert updated([(link, 1 << 20)], seconds) == [link]


def test_small_messages_say_nothing_of_bandwidth() -> None:
    link = Link(1e9, 1e-4)
    assert updated([(link, 1000)], 0.5) == [link]


LIES: list[Any] = [
    None,
    "fast",
    {},
    {"bandwidth": 1e8},
    {"bandwidth": "1e8", "latency": 1e-3},
    {"bandwidth": float("nan"), "latency": 1e-3},
    {"bandwidth": float("inf"), "latency": 1e-3},
    {"bandwidth": -5, "latency": 1e-3},
    {"bandwidth": True, "latency": True},
    {"bandwidth": [1e8], "latency": {}},
]


@pytest.mark.parametrize("said", LIES, ids=str)
def test_a_peer_that_says_nonsense_of_a_link_says_nothing(said: Any) -> None:
    assert read_link(said) is None


def test_what_a_peer_says_is_taken_within_reason() -> None:
    link = Link(1.2e8, 2e-3)
    assert read_link(plain_link(link)) == link
    huge = read_link({"bandwidth": 10**400, "latency": 1e300})
    assert huge is not None and huge.bandwidth <= 1e12 and huge.latency <= 10


@pytest.mark.parametrize(
    ("bandwidth", "text"),
    [
        (112e6, "1 GbE measured 112 MB/s"),
        (11.6e6, "100 Mbit measured 12 MB/s"),
        (1.1e9, "10 GbE measured 1100 MB/s"),
        (3.14e6, "link measured 3.1 MB/s"),
        (50e6, "link measured 50 MB/s"),
    ],
)
def test_links_are_called_what_people_call_them(bandwidth: float, text: str) -> None:
    assert str(Link(bandwidth, 1e-3)) == text
