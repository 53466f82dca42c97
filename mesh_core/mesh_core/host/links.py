"""How fast the connections of a session are: measured when a worker connects, kept up to date by what steps took.

Knows no codecs and no steps, only bytes and seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

from mesh_core.crossing.bandwidth import Link, updated
from mesh_core.host.remote import Remote
from mesh_core.host.routes import Ends, RouteEnd, RouteStats

_CONTRADICTION, _PATIENCE = 3.0, 4
"""Factor between what a link was measured at and what steps say of it that has it measured again, and the steps that
must have passed since the last time."""


class Links:
    """Bandwidth and latency between the ends of a session, each direction for itself. Used from one thread."""

    def __init__(self) -> None:
        self._measured: dict[Ends, Link] = {}
        self._believed: dict[Ends, Link] = {}
        self._cannot_say: set[Ends] = set()
        self._steps_since = _PATIENCE

    def meet(self, remote: Remote) -> bool:
        """A worker is connected: measure the ways there and back unless that was done for this connection; whether the
        connection is a new one here."""
        there, back = remote.measured()
        if self._measured.get((None, remote)) is there:
            return False
        # What was known of the connection before, its neighbours' included, says nothing of this one.
        self._believed = {ends: link for ends, link in self._believed.items() if remote not in ends}
        self.take(None, remote, there)
        self.take(remote, None, back)
        return True

    def take(self, source: RouteEnd, target: RouteEnd, link: Link) -> None:
        """A link was measured."""
        self._measured[source, target] = self._believed[source, target] = link

    def cannot_say(self, source: Remote, target: Remote) -> None:
        """A worker did not tell of its way to a neighbour: it is not asked again and again."""
        if (source, target) not in self._believed:
            self._cannot_say.add((source, target))

    def knows(self, source: RouteEnd, target: RouteEnd) -> bool:
        """Whether the way from one end to another was measured."""
        return (source, target) in self._believed

    def settled(self, ends: Ends) -> bool:
        """Whether nothing is left to be measured between two ends; always true where one of them is this host."""
        return None in ends or ends in self._believed or ends in self._cannot_say

    def find(self, ends: Ends) -> Link | None:
        """What is believed of a way; of one between workers that did not measure, as much as of their ways to here."""
        if ends in self._believed:
            return self._believed[ends]
        source, target = ends
        there, back = self._believed.get((None, target)), self._believed.get((source, None))
        if there is None or back is None:
            return None
        return Link(min(there.bandwidth, back.bandwidth), max(there.latency, back.latency))

    @property
    def doubtful(self) -> bool:
        """Whether steps contradict the last measurement so clearly that another one is due: they tell that something
        changed, and not well which link it was."""
        pairs = [(link.bandwidth, self._measured[ends].bandwidth) for ends, link in self._believed.items()]
        return self._steps_since >= _PATIENCE and any(max(p) > _CONTRADICTION * min(p) for p in pairs)

    def measure_again(self, remotes: Sequence[Remote]) -> None:
        """Measure the links to ``remotes`` anew; those between them are measured when the streams open again."""
        for remote in remotes:
            remote.forget_measured()
            self.meet(remote)
        self._steps_since = 0

    def observe(self, crossed: Sequence[RouteStats], wire_ms: float) -> None:
        """A step crossed these routes one after the other; ``wire_ms`` is what all of them together took."""
        self._steps_since += 1
        known = [(link, c.coded_bytes) for c in crossed if (link := self.find(c.route.ends)) is not None]
        if len(known) == len(crossed):
            for c, link in zip(crossed, updated(known, wire_ms / 1e3), strict=True):
                if c.route.ends in self._believed:
                    self._believed[c.route.ends] = link
