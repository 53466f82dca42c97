"""Which codec each tensor crosses with: asks the plugins for every route, and again as more becomes known.

Gathers what `mesh_core.host.links` and `mesh_core.host.speeds` know; keeps nothing of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any

from mesh_codec.base import Codec, CodecChoice, Quality
from mesh_core.errors import PlanError
from mesh_core.host.links import Links
from mesh_core.host.routes import Ends, Route, RouteEnd
from mesh_core.host.speeds import LEARNING, CodecSpeeds
from mesh_core.model.spec import ModelSpec, Role, State
from mesh_core.plugins.registry import Plugins
from mesh_core.system.logs import logger

log = logger(__name__)

_LOOK_AGAIN = 0.5
"""Seconds between two looks at the choice once what steps say has settled. A change that is found so much later costs
less than asking before each of many short steps."""


class CodecChoices:
    """Of one session. Used from one thread.

    Args:
        spec: of the model; says which tensors cross where.
        codec: by name, if the user leaves no choice; None to choose.
    """

    def __init__(
        self,
        spec: ModelSpec,
        plugins: Plugins,
        links: Links,
        speeds: CodecSpeeds,
        *,
        quality: Quality,
        codec: str | None = None,
    ) -> None:
        self._spec, self._plugins, self._links, self._speeds = spec, plugins, links, speeds
        self._quality = quality
        self._only = None if codec is None else plugins.codec(codec).name
        self._retreated = False
        self._routes: dict[tuple[int, Ends], Route] = {}
        self._asked_at = 0.0
        self._looked_at: set[frozenset[tuple[Role, int]]] = set()

    def choose(self, cut: int, source: RouteEnd, target: RouteEnd, *, anew: bool) -> Route:
        """The route over ``cut`` with a codec and settings for each tensor, for streams that open now.

        Args:
            anew: choose what pays now; else what is in use stays, while both ends have it.

        Raises:
            PlanError: no codec that both ends have meets the quality.
        """
        key = cut, (source, target)
        route = self._routes.get(key)
        if route is None:
            route = self._routes[key] = Route(cut, source, target, self._spec.states[cut])
        roles = set(route.roles.values())
        route.able = {role: self._able(route, role) for role in roles}
        if not anew and route.chosen and all(self._possible(route, role) for role in roles):
            return route
        route.chosen = {role: self._ask(route, role) for role in roles}
        route.choices = {name: route.chosen[role] for name, role in route.roles.items()}
        route.steps = 0
        return route

    def outdated(self, routes: Sequence[Route], state: State) -> bool:
        """Whether another codec pays by now, on one of ``routes``, for a step that starts with ``state``.

        Asked at every step until some have crossed, then once in a while for each size of state: asking all plugins
        for every route takes as long as all else that the mesh does in a step.
        """
        sizes, now = _expect(routes, state), monotonic()
        learning = any(route.steps < LEARNING for route in routes)
        if learning or now >= self._asked_at + _LOOK_AGAIN:
            self._asked_at = now
            self._looked_at.clear()
        elif sizes in self._looked_at:
            return False
        self._looked_at.add(sizes)
        changed = not all(self._links.settled(route.ends) for route in routes)
        for route in routes:
            for role, old in route.chosen.items():
                new = self._ask(route, role)
                if (new.codec, dict(new.settings)) == (old.codec, dict(old.settings)):
                    route.chosen[role] = new
                else:
                    changed = True
                    log.info("%s crosses cut %d otherwise from here on: %s", role, route.cut, new.reason)
        return changed

    def retreat(self) -> bool:
        """Send everything uncoded from here on, since an end cannot code it; False if that was so before, or if the
        user named the codec."""
        possible = not self._retreated and self._only is None
        self._retreated = True
        return possible

    def _able(self, route: Route, role: Role) -> tuple[tuple[Codec, ...], dict[str, Any]]:
        ends, names = _codecs_of(route), self._plugins.codecs()
        codecs = (c for name, c in names.items() if all(name in end for end in ends) and self._allowed(c, role))
        able = tuple(codecs)
        return able, {c.name: _shared([end[c.name] for end in ends]) for c in able}

    def _possible(self, route: Route, role: Role) -> bool:
        """Whether the codec in use is one that all ends have."""
        return any(codec.name == route.chosen[role].codec for codec in self._usable(route, role))

    def _usable(self, route: Route, role: Role) -> tuple[Codec, ...]:
        """The codecs that all ends have, without those that are not for the way between them."""
        link = self._links.find(route.ends)
        near = link is not None and link.near
        return tuple(codec for codec in route.able[role][0] if near or not codec.near)

    def _ask(self, route: Route, role: Role) -> CodecChoice:
        codecs, peer = self._usable(route, role), route.able[role][1]
        link = self._links.find(route.ends)
        choice: CodecChoice | None = self._plugins.hook.mesh_choose_codec(
            role=role,
            link=link,
            quality=self._quality,
            codecs=codecs,
            peer=peer,
            crossing=self._speeds.crossing(route, role, link),
        )
        if choice is None:
            wanted = f"the codec {self._only!r}" if self._only is not None else "a codec"
            names_there = ", ".join(sorted(set.intersection(*(set(end) for end in _codecs_of(route)))))
            raise PlanError(
                f"Quality {self._quality!r} needs {wanted} that all ends have and that can give it; "
                f"in common: {names_there or 'none'}.",
                hint="mesh plugins on both machines, or another quality",
            )
        return choice

    def _allowed(self, codec: Codec, role: Role) -> bool:
        if self._retreated:
            return codec.name == "raw"
        return self._only is None or role not in ("hidden", "fine") or codec.name == self._only


def _expect(routes: Sequence[Route], state: State) -> frozenset[tuple[Role, int]]:
    """Note how large the tensors will be: on the first route exactly; routes that no step has crossed yet are expected
    to carry as many elements. The sizes on the first route."""
    found: dict[Role, int] = {}
    if not routes:
        return frozenset()
    first, *others = routes
    for name, tensor in state.items():
        if name in first.roles:
            role = first.roles[name]
            found[role] = found.get(role, 0) + tensor.numel()
    first.elements = found
    sizes = frozenset(found.items())
    for route in others:
        for role in set(route.roles.values()) & found.keys():
            route.elements.setdefault(role, found[role])
    return sizes


def _codecs_of(route: Route) -> list[Mapping[str, Any]]:
    """What the workers at the ends of a route have."""
    return [remote.welcome.codecs for remote in route.ends if remote is not None]


def _shared(capabilities: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all ends can do, as `Codec.capabilities` says it; what differs in any other way is left out."""
    first, *others = capabilities
    if not others:
        return dict(first)
    both = {key: _common([value, *(other.get(key) for other in others)]) for key, value in first.items()}
    return {key: value for key, value in both.items() if value is not None}


def _common(values: Sequence[Any]) -> Any:
    first, *others = values
    if all(value == first for value in others):
        return first
    if all(isinstance(value, list | tuple) for value in values):
        return [item for item in first if all(item in other for other in others)]
    if all(isinstance(value, int | float) for value in values):
        return min(values)
    return None
