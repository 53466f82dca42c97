"""What a session consists of: spans on workers, and runs of them that hand over to each other. Knows no sockets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mesh_codec.base import CodecChoice
from mesh_core import wire
from mesh_core.adapter import ModelSpec
from mesh_core.errors import MeshError
from mesh_core.payload import Streams
from mesh_core.remote import Remote, next_id
from mesh_core.spans import BlockSpan


@dataclass(frozen=True)
class Identity:
    """The model that all ends must hold."""

    spec: ModelSpec
    structure: str
    fingerprint: str


@dataclass(eq=False)
class RemoteHop:
    """A span on a worker, how its state is coded on the way in, the constants that it was sent, and the LoRAs that it
    has, as they are named on the wire."""

    remote: Remote
    span: BlockSpan
    inputs: dict[str, CodecChoice] = field(default_factory=dict)
    sent: set[str] = field(default_factory=set)
    loras: list[dict[str, Any]] = field(default_factory=list)

    def request(
        self, identity: Identity, dtype: str, outputs: Mapping[str, CodecChoice], following: RemoteHop | None
    ) -> wire.Open:
        """The message that has the worker hold the span ready, and hand over to ``following``."""
        return wire.Open(
            id=next_id(),
            session=self.remote.session,
            family=identity.spec.family,
            structure=identity.structure,
            fingerprint=identity.fingerprint,
            span=[self.span.start, self.span.stop],
            dtype=dtype,
            loras=self.loras,
            inputs=_plain(self.inputs),
            outputs=_plain(outputs),
            next=None if following is None else _introduction(following.remote),
            options={},
        )


@dataclass
class Leg:
    """Hops that hand over to each other directly; the host sends to the first and hears from the last."""

    hops: list[RemoteHop]
    outputs: dict[str, CodecChoice]
    encoder: Streams
    decoder: Streams


class CannotReachNeighbour(Exception):
    """A worker cannot hand over to hop number ``hop``."""

    def __init__(self, hop: int, cause: MeshError) -> None:
        self.hop = hop
        super().__init__(cause.message)


def _plain(choices: Mapping[str, CodecChoice]) -> dict[str, Any]:
    return {name: {"codec": c.codec, "settings": dict(c.settings)} for name, c in choices.items()}


def _introduction(remote: Remote) -> dict[str, Any]:
    return {"address": remote.address.text, "server_key": remote.address.server_key, "session": remote.session}
