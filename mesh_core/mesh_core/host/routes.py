"""The routes that a state takes from one end to the next: facts. Must not know how codecs are chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from mesh_codec.base import Codec, CodecChoice, StreamMemory
from mesh_core.host.remote import Remote
from mesh_core.model.spec import Role

ASSUMED: Mapping[Role, int] = {
    "hidden": 4608 * 4096,
    "fine": 128 * 2048,
    "latent": 4096 * 128,
    "prediction": 4096 * 128,
    "exact": 4096,
}
"""Elements of a picture of 1024x1024 in a model 4096 wide, and of the sound of 5 seconds in one half as wide: what is
expected until the first step."""

RouteEnd: TypeAlias = "Remote | None"
"""An end of a route: a worker, or None for this host."""

Ends: TypeAlias = "tuple[RouteEnd, RouteEnd]"
"""Where a route starts and where it ends."""


@dataclass(eq=False)
class Route:
    """From one end to the next, over one cut.

    Attributes:
        elements: of the tensors of a role together.
        bits: per element as they came out, by codec and settings.
        choices: in use, by the tensors' names.
        chosen: the same by role.
        able: by role, the codecs that all ends have and what those ends can do with them.
        steps: that crossed since the streams opened.
        learnt_at: when one of them was last compared with what was expected; seconds of the monotonic clock.
    """

    cut: int
    source: RouteEnd
    target: RouteEnd
    roles: Mapping[str, Role]
    elements: dict[Role, int] = field(default_factory=dict)
    bits: dict[str, float] = field(default_factory=dict)
    choices: dict[str, CodecChoice] = field(default_factory=dict)
    chosen: dict[Role, CodecChoice] = field(default_factory=dict)
    able: dict[Role, tuple[tuple[Codec, ...], dict[str, Any]]] = field(default_factory=dict)
    steps: int = 0
    learnt_at: float = 0.0

    @property
    def ends(self) -> Ends:
        """Source and target."""
        return self.source, self.target

    @property
    def memory(self) -> StreamMemory:
        """The worst that the codecs in use say of theirs."""
        found = {
            codec.memory(self.chosen[role].settings)
            for role, (codecs, _) in self.able.items()
            for codec in codecs
            if role in self.chosen and codec.name == self.chosen[role].codec
        }
        return "reset" if "reset" in found else "restored" if "restored" in found else "none"

    @cached_property
    def main(self) -> Role:
        """The role of what most bytes belong to."""
        return max(self.roles.values(), key=lambda role: ASSUMED[role])


@dataclass(frozen=True)
class RouteStats:
    """What one step cost on one route, in bytes and milliseconds."""

    route: Route
    raw_bytes: int
    coded_bytes: int
    encode_ms: float
    decode_ms: float


def reason_of(routes: Iterable[Route]) -> str:
    """Why the hidden state crosses as it does, for people; without one, the model's input and output."""
    return "; ".join(dict.fromkeys(choice.reason for choice in _shown(routes) if choice.reason))


def codec_name_of(routes: Iterable[Route]) -> str:
    """The codecs of the hidden state by name, joined with ``+``."""
    return "+".join(sorted({choice.codec for choice in _shown(routes)})) or "raw"


def _shown(routes: Iterable[Route]) -> list[CodecChoice]:
    known = list(routes)
    hidden = [route.chosen["hidden"] for route in known if "hidden" in route.chosen]
    return hidden or [route.chosen[route.main] for route in known]
