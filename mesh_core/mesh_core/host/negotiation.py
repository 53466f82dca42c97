"""How the state crosses: gathers what is known of links, ends and codecs, asks the plugins, learns from steps.

One `Negotiation` belongs to one session of a host. Knows workers, but not how steps are sent to them.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import isfinite
from time import monotonic
from typing import Any

import torch

from mesh_codec.base import Codec, CodecChoice, Quality
from mesh_core.crossing.bandwidth import Link, read_link, updated
from mesh_core.crossing.codec_speed import SpeedBook, read_speeds
from mesh_core.crossing.cost import Crossing, End, settings_key
from mesh_core.errors import PlanError
from mesh_core.host.remote import Remote, measure
from mesh_core.host.ways import ASSUMED, Crossed, Way
from mesh_core.model.spec import ModelSpec, Role, State
from mesh_core.plugins.registry import Plugins

log = logging.getLogger(__name__)

_CONTRADICTION, _PATIENCE = 3.0, 4
"""Factor between what a link was measured at and what steps say of it that has it measured again, and the steps that
must have passed since the last time."""

_NOTICEABLE = 1e-3
"""Seconds under which a duration says nothing of a codec's speed."""

_LEARNING, _LOOK_AGAIN = 4, 0.5
"""Steps after which what they say has settled; seconds between two looks at the choice from then on. A change that is
found so much later costs less than asking before each of many short steps."""

_LEARN_AGAIN = 0.1
"""Seconds between two steps that what is believed of codecs on a way is compared with, once it has settled."""

_GAIN, _AT_ONCE, _MOST = 0.5, 64.0, 1e6
"""How far one step moves what is believed of a codec's speed, by what factor it may do so, and how far in all."""


class Negotiation:
    """Args:
    spec: of the model; says which tensors cross where.
    codec: by name, if the user leaves no choice; None to choose.
    """

    def __init__(
        self,
        spec: ModelSpec,
        plugins: Plugins,
        *,
        dtype: torch.dtype,
        device: torch.device,
        quality: Quality,
        codec: str | None = None,
    ) -> None:
        self._spec, self._plugins, self._dtype, self._quality = spec, plugins, dtype, quality
        self._only = None if codec is None else plugins.codec(codec).name
        self._retreated = False
        self._book = SpeedBook(device)
        self._host = End(book=self._book)
        self._ends: defaultdict[int, End] = defaultdict(End)
        self._links: dict[tuple[int, int], Link] = {}
        self._probed: dict[tuple[int, int], Link] = {}
        self._since = _PATIENCE
        self._mute: set[tuple[int, int]] = set()
        self._ways: dict[tuple[int, int, int], Way] = {}
        self._arranged: list[Way] = []
        self._asked_at = 0.0
        self._looked_at: set[frozenset[tuple[Role, int]]] = set()

    def close(self) -> None:
        """Measure nothing more. May be called twice."""
        self._book.close()

    # Facts

    def connected(self, remote: Remote) -> None:
        """Measure the way to a worker that was just connected, and take what it says of itself."""
        there, back = measure(remote)
        remote.measured = True
        self._links = {ends: link for ends, link in self._links.items() if id(remote) not in ends}
        self._take({(_HERE, id(remote)): there, (id(remote), _HERE): back})
        self._tell(remote, [speeds for device in remote.welcome.devices for speeds in _listed(device.get("speeds"))])

    @property
    def doubtful(self) -> bool:
        """Whether steps contradict the last measurement so clearly that another one is due: they tell that something
        changed, and not well which link it was."""
        links = [(link.bandwidth, self._probed[ends].bandwidth) for ends, link in self._links.items()]
        return self._since >= _PATIENCE and any(max(a, b) > _CONTRADICTION * min(a, b) for a, b in links)

    def measure_again(self, remotes: Sequence[Remote]) -> None:
        """Measure the links to ``remotes`` anew; those between them are measured when the streams open again."""
        for remote in remotes:
            self.connected(remote)
        self._since = 0

    def _take(self, measured: Mapping[tuple[int, int], Link]) -> None:
        self._links |= measured
        self._probed |= measured

    def knows(self, source: Remote, target: Remote) -> bool:
        """Whether the way from one worker to another was measured."""
        return (id(source), id(target)) in self._links

    def opened(self, source: Remote, target: Remote | None, info: Mapping[str, Any]) -> None:
        """Take what a worker said when its session opened."""
        self._tell(source, _listed(info.get("speeds")))
        link = read_link(info.get("link"))
        if target is not None and link is not None:
            self._take({(id(source), id(target)): link})
        elif target is not None and not self.knows(source, target):
            self._mute.add((id(source), id(target)))

    def _tell(self, remote: Remote, said: Sequence[Any]) -> None:
        self._ends[id(remote)].told |= read_speeds(said)

    def _link(self, way: Way) -> Link | None:
        a, b = _place(way.source), _place(way.target)
        if (a, b) in self._links:
            return self._links[a, b]
        there, back = self._links.get((_HERE, b)), self._links.get((a, _HERE))
        if there is None or back is None:
            return None
        # Two workers that did not measure: as their ways to this host.
        return Link(min(there.bandwidth, back.bandwidth), max(there.latency, back.latency))

    # Choices

    def begin(self) -> None:
        """Forget which ways are in use; `choose` names them anew."""
        self._arranged = []

    def choose(self, cut: int, source: Remote | None, target: Remote | None) -> Way:
        """The way over ``cut`` with a codec and settings for each tensor.

        Raises:
            PlanError: no codec that both ends have meets the quality.
        """
        key = cut, _place(source), _place(target)
        if key not in self._ways:
            self._ways[key] = Way(cut, source, target, self._spec.states[cut])
        way = self._ways[key]
        self._arranged.append(way)
        roles = set(way.roles.values())
        way.able = {role: self._able(way, role) for role in roles}
        way.asked = {role: self._ask(way, role) for role in roles}
        way.choices = {name: way.asked[role] for name, role in way.roles.items()}
        way.steps = 0
        return way

    def outdated(self, state: State) -> bool:
        """Whether another codec pays by now, on some way, for a step that starts with ``state``.

        Asked at every step until some have crossed, then once in a while for each size of state: asking all plugins
        for every way takes as long as all else that the mesh does in a step.
        """
        sizes, now = self._expect(state), monotonic()
        learning = any(way.steps < _LEARNING for way in self._arranged)
        if learning or now >= self._asked_at + _LOOK_AGAIN:
            self._asked_at = now
            self._looked_at.clear()
        elif sizes in self._looked_at:
            return False
        self._looked_at.add(sizes)
        between = [(w.source, w.target) for w in self._arranged if w.source is not None and w.target is not None]
        changed = not all(self.knows(a, b) or (id(a), id(b)) in self._mute for a, b in between)
        for way in self._arranged:
            for role, old in way.asked.items():
                new = self._ask(way, role)
                if (new.codec, dict(new.settings)) == (old.codec, dict(old.settings)):
                    way.asked[role] = new
                else:
                    changed = True
                    log.info("%s crosses cut %d otherwise from here on: %s", role, way.cut, new.reason)
        return changed

    def retreat(self) -> bool:
        """Send everything uncoded from here on, since an end cannot code it; False if that was so before, or if the
        user named the codec."""
        possible = not self._retreated and self._only is None
        self._retreated = True
        return possible

    def _able(self, way: Way, role: Role) -> tuple[tuple[Codec, ...], dict[str, Any]]:
        ends, names = _codecs_of(way), self._plugins.codecs()
        codecs = (c for name, c in names.items() if all(name in end for end in ends) and self._allowed(c, role))
        able = tuple(codecs)
        return able, {c.name: _shared([end[c.name] for end in ends]) for c in able}

    def _ask(self, way: Way, role: Role) -> CodecChoice:
        codecs, peer = way.able[role]
        choice: CodecChoice | None = self._plugins.hook.mesh_choose_codec(
            role=role,
            link=self._link(way),
            quality=self._quality,
            codecs=codecs,
            peer=peer,
            crossing=self._crossing(way, role),
        )
        if choice is None:
            wanted = f"the codec {self._only!r}" if self._only is not None else "a codec"
            names_there = ", ".join(sorted(set.intersection(*(set(end) for end in _codecs_of(way)))))
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

    def _crossing(self, way: Way, role: Role) -> Crossing:
        return Crossing(
            elements=way.elements.get(role, ASSUMED[role]),
            dtype=self._dtype,
            sender=self._end(way.source),
            receiver=self._end(way.target),
            here=self._book,
            link=self._link(way),
            bits=way.bits,
            current=way.asked.get(role) if way.steps else None,
        )

    def _end(self, remote: Remote | None) -> End:
        return self._host if remote is None else self._ends[id(remote)]

    # Learning

    def _expect(self, state: State) -> frozenset[tuple[Role, int]]:
        """Sizes: of the first way exactly; ways that no step has crossed yet are taken for as wide. The first way's."""
        found: dict[Role, int] = {}
        if not self._arranged:
            return frozenset()
        for name, tensor in state.items():
            if name in self._arranged[0].roles:
                role = self._arranged[0].roles[name]
                found[role] = found.get(role, 0) + tensor.numel()
        sizes, self._arranged[0].elements = frozenset(found.items()), found
        for way in self._arranged[1:]:
            for role in set(way.roles.values()) & found.keys():
                way.elements.setdefault(role, found[role])
        return sizes

    def observe(self, crossed: Sequence[Crossed], wire_ms: float) -> None:
        """Learn from a step: how fast the links and codecs were, and what came out of them."""
        self._since += 1
        now = monotonic()
        links = [self._link(c.way) for c in crossed]
        if all(link is not None for link in links):
            known = [(link, c.coded_bytes) for link, c in zip(links, crossed, strict=True) if link is not None]
            for c, link in zip(crossed, updated(known, wire_ms / 1e3), strict=True):
                ends = _place(c.way.source), _place(c.way.target)
                if ends in self._links:
                    self._links[ends] = link
        for c in crossed:
            c.way.steps += 1
            elements = c.raw_bytes // self._dtype.itemsize
            if elements > 0:
                c.way.elements[c.way.main] = elements
            due = c.way.steps <= _LEARNING or now >= c.way.learnt_at + _LEARN_AGAIN
            # The first step has no past to predict from, and everything that happens once.
            if elements > 0 and c.way.steps > 1 and due:
                c.way.learnt_at = now
                self._learn(c, elements)

    def _learn(self, crossed: Crossed, elements: int) -> None:
        way, choice = crossed.way, crossed.way.asked[crossed.way.main]
        codec = next((c for c in way.able[way.main][0] if c.name == choice.codec), None)
        if codec is None:
            return
        key, seen = settings_key(choice.codec, choice.settings), 8.0 * crossed.coded_bytes / elements
        way.bits[key] = (way.bits.get(key, seen) + seen) / 2
        cost = self._crossing(way, way.main).cost(codec, choice.settings)
        if cost is None:
            return
        for end, direction, expected, ms in (
            (self._end(way.source), "encode", cost.encode, crossed.encode_ms),
            (self._end(way.target), "decode", cost.decode, crossed.decode_ms),
        ):
            took = ms / 1e3
            if isfinite(took) and max(took, expected) > _NOTICEABLE:
                ratio = min(max(took, 0.0) / max(expected, 1e-6), _AT_ONCE)
                factor = end.factors.get((codec.name, direction), 1.0) * max(ratio, 1 / _AT_ONCE) ** _GAIN
                end.factors[codec.name, direction] = min(max(factor, 1 / _MOST), _MOST)

    # For people

    @property
    def reason(self) -> str:
        """Why the hidden state crosses as it does; without one, the model's input and output."""
        return "; ".join(dict.fromkeys(choice.reason for choice in self._shown() if choice.reason))

    @property
    def codec_name(self) -> str:
        return "+".join(sorted({choice.codec for choice in self._shown()})) or "raw"

    def _shown(self) -> list[CodecChoice]:
        hidden = [way.asked["hidden"] for way in self._arranged if "hidden" in way.asked]
        return hidden or [way.asked[way.main] for way in self._arranged]


_HERE = 0
"""Stands for this host among the ids of workers' objects."""


def _place(remote: Remote | None) -> int:
    return _HERE if remote is None else id(remote)


def _codecs_of(way: Way) -> list[Mapping[str, Any]]:
    """What the workers at the ends of a way have."""
    return [remote.welcome.codecs for remote in (way.source, way.target) if remote is not None]


def _listed(said: object) -> list[Any]:
    return list(said) if isinstance(said, list | tuple) else []


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
