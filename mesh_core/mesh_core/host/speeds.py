"""How fast codecs run at the ends of a session: what each end says of itself, and what steps really took there.

Knows no links.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import isfinite
from time import monotonic

import torch

from mesh_core.crossing.bandwidth import Link
from mesh_core.crossing.codec_speed import read_speeds
from mesh_core.crossing.cost import Crossing, End, settings_key
from mesh_core.crossing.speed_book import SpeedBook
from mesh_core.host.remote import Remote
from mesh_core.host.routes import ASSUMED, Route, RouteEnd, RouteStats
from mesh_core.model.spec import Role

_NOTICEABLE = 1e-3
"""Seconds under which a duration says nothing of a codec's speed."""

LEARNING = 4
"""Steps over a route after which what they say has settled."""

_LEARN_AGAIN = 0.1
"""Seconds between two steps that what is believed of codecs on a route is compared with, once it has settled."""

_GAIN, _AT_ONCE, _MOST = 0.5, 64.0, 1e6
"""How far one step moves what is believed of a codec's speed, by what factor it may do so, and how far in all."""


class CodecSpeeds:
    """Of one session. Used from one thread.

    Args:
        device: of this host.
        dtype: of the states that cross.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._book = SpeedBook(device)
        self._host = End(book=self._book)
        self._ends: defaultdict[Remote, End] = defaultdict(End)

    def close(self) -> None:
        """Measure nothing more. May be called twice."""
        self._book.close()

    def meet(self, remote: Remote) -> None:
        """A worker is connected: take what it says of each of its devices."""
        for device in remote.welcome.devices:
            self.hear(remote, device.get("speeds"))

    def hear(self, remote: Remote, said: object) -> None:
        """Take what a worker says of its codecs, within reason."""
        self._ends[remote].claimed |= read_speeds(said)

    def end(self, place: RouteEnd) -> End:
        """What is believed of one end."""
        return self._host if place is None else self._ends[place]

    def crossing(self, route: Route, role: Role, link: Link | None) -> Crossing:
        """A route as ``mesh_choose_codec`` gets it."""
        return Crossing(
            elements=route.elements.get(role, ASSUMED[role]),
            dtype=self._dtype,
            sender=self.end(route.source),
            receiver=self.end(route.target),
            here=self._book,
            link=link,
            bits=route.bits,
            current=route.chosen.get(role) if route.steps else None,
        )

    def observe(self, crossed: Sequence[RouteStats]) -> None:
        """Learn from a step: what came out of the codecs, and how long they took."""
        now = monotonic()
        for c in crossed:
            route = c.route
            route.steps += 1
            elements = c.raw_bytes // self._dtype.itemsize
            if elements > 0:
                route.elements[route.main] = elements
            due = route.steps <= LEARNING or now >= route.learnt_at + _LEARN_AGAIN
            # The first step has no past to predict from, and everything that happens once.
            if elements > 0 and route.steps > 1 and due:
                route.learnt_at = now
                self._learn(c, elements)

    def _learn(self, crossed: RouteStats, elements: int) -> None:
        route, choice = crossed.route, crossed.route.chosen[crossed.route.main]
        codec = next((c for c in route.able[route.main][0] if c.name == choice.codec), None)
        if codec is None:
            return
        key, seen = settings_key(choice.codec, choice.settings), 8.0 * crossed.coded_bytes / elements
        route.bits[key] = (route.bits.get(key, seen) + seen) / 2
        cost = self.crossing(route, route.main, None).cost(codec, choice.settings)
        if cost is None:
            return
        for place, direction, expected, ms in (
            (route.source, "encode", cost.encode, crossed.encode_ms),
            (route.target, "decode", cost.decode, crossed.decode_ms),
        ):
            _correct(self.end(place), codec.name, direction, expected, ms / 1e3)


def _correct(end: End, codec: str, direction: str, expected: float, took: float) -> None:
    """Move what is believed of one codec at one end towards what a step took, in seconds."""
    if isfinite(took) and max(took, expected) > _NOTICEABLE:
        ratio = min(max(took, 0.0) / max(expected, 1e-6), _AT_ONCE)
        factor = end.factors.get((codec, direction), 1.0) * max(ratio, 1 / _AT_ONCE) ** _GAIN
        end.factors[codec, direction] = min(max(factor, 1 / _MOST), _MOST)
