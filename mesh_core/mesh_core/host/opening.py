"""Opening the remote part of a model: connect to the workers, arrange who hands over to whom, have spans held ready."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from mesh_codec.base import DecodeLimits
from mesh_core import wire
from mesh_core.crossing.bandwidth import read_link
from mesh_core.crossing.streams import Streams
from mesh_core.errors import NotAuthorised, Unreachable
from mesh_core.host.choices import CodecChoices
from mesh_core.host.hops import CannotReachNeighbour, Leg, RemoteHop
from mesh_core.host.links import Links
from mesh_core.host.loras import SessionLoras
from mesh_core.host.options import ModelIdentity, SessionOptions
from mesh_core.host.progress import Activity, ProgressReport
from mesh_core.host.routes import Route
from mesh_core.host.speeds import CodecSpeeds
from mesh_core.plugins.registry import Plugins
from mesh_core.system.logs import logger

log = logger(__name__)


class Opener:
    """Opens the hops of one session, and opens them anew. Used from one thread.

    Args:
        hops: in execution order.
        report: told about loading.
    """

    def __init__(
        self, identity: ModelIdentity, hops: Sequence[RemoteHop], options: SessionOptions, plugins: Plugins,
        loras: SessionLoras, report: ProgressReport | None,
    ) -> None:  # fmt: skip
        self._identity, self._hops, self._options = identity, hops, options
        self._plugins, self._loras, self._report = plugins, loras, report
        self.links = Links()
        self.speeds = CodecSpeeds(options.device, options.dtype)
        self.codecs = CodecChoices(
            identity.spec, plugins, self.links, self.speeds, quality=options.quality, codec=options.codec
        )
        self._relayed: set[int] = set()
        self._agreed: list[Leg] = []
        # Until all agree: a worker that lost its streams says so once, and may have to be asked again.
        self._kept = True

    def connect(self, within: float | None = None) -> None:
        """Connect to the workers that are not connected; all are believed to have nothing of this session.

        Args:
            within: seconds for each connection; the deadline that is set when None.
        """
        for hop in self._hops:
            if not hop.remote.connected:
                hop.remote.connect(within)
            if self.links.meet(hop.remote):
                # Only now: what the worker said when its session opened is newer than its welcome.
                self.speeds.meet(hop.remote)
            hop.sent.clear()
            self._loras.connected(hop)

    def agree(self, *, anew: bool) -> tuple[list[Leg], bool]:
        """Have every worker hold its span ready; and whether all codec streams go on from where they were.

        A worker that cannot reach its neighbour is relayed through this host from then on.

        Args:
            anew: see `CodecChoices.choose`.

        Raises:
            MeshError: what a worker says went wrong, named by the worker that it concerns.
        """
        while True:
            legs = self._arrange(anew)
            try:
                for leg in reversed(legs):
                    self._open_leg(leg)
                before, self._agreed = self._agreed, legs
                kept, self._kept = self._kept, True
                same = len(before) == len(legs) and all(map(Leg.go_on_from, legs, before))
                return legs, same and kept
            except CannotReachNeighbour as error:
                log.warning("%s; its state goes through this machine instead", error)
                self._relayed.add(error.hop)

    def close(self) -> None:
        """Forget what was agreed on, with all that codecs keep for it. May be called twice."""
        self.speeds.close()
        self._agreed = []

    def _arrange(self, anew: bool) -> list[Leg]:
        starts = [0, *sorted(i for i in self._relayed if 0 < i < len(self._hops))] if self._hops else []
        groups = [list(self._hops[a:b]) for a, b in zip(starts, [*starts[1:], len(self._hops)], strict=True)]
        codecs, limits = self._plugins.codecs(), DecodeLimits()
        legs = []
        for group in groups:
            ends = [None, *(hop.remote for hop in group), None]
            cuts = [*(hop.span.start for hop in group), group[-1].span.stop]
            routes = [
                self.codecs.choose(cut, a, b, anew=anew) for cut, (a, b) in zip(cuts, pairwise(ends), strict=True)
            ]
            streams = [Streams(route.choices, codecs, limits) for route in (routes[0], routes[-1])]
            legs.append(Leg(group, routes, *streams))
        return legs

    def _open_leg(self, leg: Leg) -> None:
        following: RemoteHop | None = None
        for hop, (inputs, outputs) in reversed(list(zip(leg.hops, pairwise(leg.routes), strict=True))):
            if following is not None:
                admit = wire.Admit(wire.next_id(), following.remote.session, hop.remote.welcome.client_key)
                following.remote.ask(admit, wire.Ok, timeout=self._options.settings.deadlines.connect)
            self._open_hop(hop, inputs, outputs, following)
            following = hop

    def _open_hop(self, hop: RemoteHop, inputs: Route, outputs: Route, following: RemoteHop | None) -> None:
        remote, target = hop.remote, following.remote if following is not None else None
        measure = target is not None and not self.links.knows(remote, target)
        numerics = self._options.numerics
        message = hop.request(self._identity, numerics, inputs.choices, outputs.choices, following, measure=measure)

        def progress(p: wire.Progress) -> None:
            if self._report is not None:
                self._report(Activity.of_worker(remote.name, p.phase, p.done, p.total))

        try:
            answer = remote.ask(
                message, wire.Opened, timeout=self._options.settings.deadlines.load, on_progress=progress
            )
        except (Unreachable, NotAuthorised) as error:
            if following is None:
                raise
            raise CannotReachNeighbour(self._hops.index(following), error) from error
        self.speeds.hear(remote, answer.info.get("speeds"))
        if target is not None:
            link = read_link(answer.info.get("link"))
            if link is not None:
                self.links.take(remote, target, link)
            else:
                self.links.cannot_say(remote, target)
        remote.holds_session = True
        self._kept &= answer.info.get("continues") is True
