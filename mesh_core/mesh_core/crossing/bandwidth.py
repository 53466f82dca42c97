"""How fast bytes get from one end to another: measured when a connection opens, kept up to date from what crosses.

Knows no sockets: whoever has a connection gives a function that exchanges bytes over it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from time import perf_counter
from typing import Any

Exchange = Callable[[int, int], None]
"""Sends so many bytes, asks for so many back, and returns when they came."""

_SIZES = (8 << 10, 64 << 10, 512 << 10, 4 << 20)
"""Bytes of the probes, each only if the one before says that it will not take long."""

_TAKES_LONG = 0.09
"""Seconds. Both directions, small probes included, stay under 0.3 s from 1 Mbit/s upwards."""

_ONE_HICCUP = 64 << 10
"""Probes up to this size are sent twice: a pause of the system weighs much in them."""

_FAST = 300e6
"""Bytes per second from which more precision changes no decision."""

_BANDWIDTHS, _LATENCIES = (1e3, 1e12), (0.0, 10.0)
"""What a measurement or a peer may say; anything beyond is taken for the nearest."""

_LONGEST_WAY = 40

_NOMINAL = {12.5e6: "100 Mbit", 125e6: "1 GbE", 312.5e6: "2.5 GbE", 625e6: "5 GbE", 1250e6: "10 GbE"}
_NEAR = (0.7, 1.1)
"""What a link of a nominal rate is measured at, as a share of it: headers make it less, bursts more."""


@dataclass(frozen=True)
class Link:
    """One direction of a connection.

    Attributes:
        bandwidth: bytes per second, one way.
        latency: seconds for a small message there and back.
        way: what people call it between processes of one user on one machine; else empty.
    """

    bandwidth: float
    latency: float
    way: str = ""

    @property
    def near(self) -> bool:
        """Whether it is between processes of one user on one machine."""
        return bool(self.way)

    def seconds(self, nbytes: float) -> float:
        """What ``nbytes`` take to get there."""
        return self.latency / 2 + nbytes / self.bandwidth

    def __str__(self) -> str:
        near = (n for rate, n in _NOMINAL.items() if _NEAR[0] * rate <= self.bandwidth <= _NEAR[1] * rate)
        mb_s = self.bandwidth / 1e6
        return f"{self.way or next(near, 'link')} measured {mb_s:.{0 if mb_s >= 10 else 1}f} MB/s"


def measure(exchange: Exchange) -> tuple[Link, Link]:
    """The ways there and back, measured now: small probes first, larger ones only where they are quick."""
    latency = min(_elapsed(exchange, 0, 0) for _ in range(3))
    there, back = measure_one_way(lambda n: exchange(n, 0), latency), measure_one_way(lambda n: exchange(0, n), latency)
    return there, back


def measure_one_way(send: Callable[[int], None], latency: float | None = None) -> Link:
    """The way that ``send`` takes with so many bytes; it returns when they are known to have arrived."""
    if latency is None:
        latency = min(_elapsed(send, 0) for _ in range(3))
    rate = float("inf")
    for size in _SIZES:
        if size / rate > _TAKES_LONG or (size > _SIZES[2] and rate > _FAST):
            break
        quick = size <= _ONE_HICCUP and size / rate < _TAKES_LONG / 2
        elapsed = min(_elapsed(send, size) for _ in range(2 if quick else 1))
        rate = size / max(elapsed - latency, elapsed / 8, 1e-7)
    return _within(rate, latency)


def read_link(said: object) -> Link | None:
    """What a peer says of a link, within reason; None when it says nothing that can be used."""
    if not isinstance(said, Mapping):
        return None
    bandwidth, latency = positive(said.get("bandwidth")), positive(said.get("latency"))
    way = said.get("way", "")
    if bandwidth is None or latency is None:
        return None
    return _within(bandwidth, latency, way[:_LONGEST_WAY] if isinstance(way, str) else "")


def plain_link(link: Link) -> dict[str, float | str]:
    """``link`` as `read_link` reads it."""
    return {"bandwidth": link.bandwidth, "latency": link.latency, "way": link.way}


_GAIN = 0.6
"""Share of the way from what was believed to what was seen, in orders of magnitude."""

_AT_ONCE = 64.0
"""Factor by which one step may seem to have changed a link."""

_TELLING = 64 << 10
"""Bytes under which a transfer says more about latencies than about bandwidth."""


def updated(crossed: Sequence[tuple[Link, int]], seconds: float) -> list[Link]:
    """The links after ``seconds`` in which, one after the other, so many bytes crossed each of them.

    Links that should have taken most of the time take most of the blame.
    """
    links = [link for link, _ in crossed]
    expected = [nbytes / link.bandwidth for link, nbytes in crossed]
    waiting = sum(link.latency / 2 for link in links)
    if not isfinite(seconds) or seconds <= 0 or sum(n for _, n in crossed) < _TELLING or sum(expected) <= 0:
        return links
    moving = max(seconds - waiting, seconds / 8)
    factor = min(max(sum(expected) / moving, 1 / _AT_ONCE), _AT_ONCE)
    shares = [e / max(expected) for e in expected]
    return [
        _within(link.bandwidth * factor ** (_GAIN * share), link.latency, link.way)
        for link, share in zip(links, shares, strict=True)
    ]


def _elapsed(function: Callable[..., None], *arguments: Any) -> float:
    began = perf_counter()
    function(*arguments)
    return perf_counter() - began


def _within(bandwidth: float, latency: float, way: str = "") -> Link:
    lowest, highest = _BANDWIDTHS
    return Link(min(max(bandwidth, lowest), highest), min(max(latency, _LATENCIES[0]), _LATENCIES[1]), way)


def positive(value: object) -> float | None:
    """``value`` if it is a finite number over 0, as a float; whatever else a peer may say is None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, int):
        value = float(min(max(value, -(1 << 64)), 1 << 64))
    return value if isfinite(value) and value > 0 else None
