"""The ways that the state of a session takes from one end to the next: facts. Must not know how codecs are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mesh_codec.base import Codec, CodecChoice
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


@dataclass
class Way:
    """From one end to the next, over one cut; None stands for this host.

    Attributes:
        elements: of the tensors of a role together.
        bits: per element as they came out, by codec and settings.
        choices: in use, by the tensors' names.
        asked: the same by role.
        able: by role, the codecs that all ends have and what those ends can do with them.
        steps: that crossed since the streams opened.
        learnt_at: when one of them was last compared with what was expected.
    """

    cut: int
    source: Remote | None
    target: Remote | None
    roles: Mapping[str, Role]
    elements: dict[Role, int] = field(default_factory=dict)
    bits: dict[str, float] = field(default_factory=dict)
    choices: dict[str, CodecChoice] = field(default_factory=dict)
    asked: dict[Role, CodecChoice] = field(default_factory=dict)
    able: dict[Role, tuple[tuple[Codec, ...], dict[str, Any]]] = field(default_factory=dict)
    steps: int = 0
    learnt_at: float = 0.0

    @cached_property
    def main(self) -> Role:
        """The role of what most bytes belong to."""
        return max(self.roles.values(), key=lambda role: ASSUMED[role])


@dataclass(frozen=True)
class Crossed:
    """What one step cost on one way."""

    way: Way
    raw_bytes: int
    coded_bytes: int
    encode_ms: float
    decode_ms: float
