"""What a session consists of: spans on workers, and runs of them that hand over to each other. Knows no sockets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mesh_codec.base import CodecChoice, Encoded
from mesh_codec.dtypes import from_torch
from mesh_core import wire
from mesh_core.crossing.stats import HopStats
from mesh_core.crossing.streams import Payload, Streams, entry
from mesh_core.errors import MeshError
from mesh_core.host.options import ModelIdentity
from mesh_core.host.remote import Remote
from mesh_core.host.routes import Route, RouteStats
from mesh_core.model.numerics import LORA, Numerics, labels_of
from mesh_core.model.spans import BlockSpan

_MAX_REMEMBERED = 256
"""Constants per worker that the host remembers to have sent."""


@dataclass(eq=False)
class RemoteHop:
    """A span on a worker.

    Attributes:
        constants: names of the generation's constants that the span needs.
        sent: hashes of those that the worker was sent.
        loras: that it has, as the wire names them.
    """

    remote: Remote
    span: BlockSpan
    constants: tuple[str, ...] = ()
    sent: set[str] = field(default_factory=set)
    loras: list[dict[str, Any]] = field(default_factory=list)

    def send_constants(self, missing: Mapping[str, Encoded], timeout: float) -> int:
        """Send constants of a generation, by the hash of each; returns their bytes."""
        if len(self.sent) > _MAX_REMEMBERED:
            self.sent.clear()
        exact = CodecChoice("raw")
        items = [{"hash": digest, **entry("constant", exact, coded)} for digest, coded in missing.items()]
        buffers = [b for e in missing.values() for b in e.buffers]
        message = wire.Constants(wire.next_id(), self.remote.session, items)
        self.remote.ask(message, wire.Ok, buffers=buffers, timeout=timeout)
        self.sent.update(missing)
        return sum(e.nbytes for e in missing.values())

    def request(
        self,
        identity: ModelIdentity,
        numerics: Numerics,
        inputs: Mapping[str, CodecChoice],
        outputs: Mapping[str, CodecChoice],
        following: RemoteHop | None,
        *,
        measure: bool,
    ) -> wire.Open:
        """The message that has the worker hold the span ready, and hand over to ``following``.

        Args:
            measure: whether it is to measure the way there.
        """
        own = identity.spec.parameters_of(self.span)
        stored = labels_of(own.values())
        asked = {*stored, LORA} if stored else ()
        return wire.Open(
            id=wire.next_id(),
            session=self.remote.session,
            family=identity.spec.family,
            structure=identity.structure,
            fingerprint=identity.fingerprint,
            span=[self.span.start, self.span.stop],
            dtype=from_torch(numerics.dtype).name,
            others={name: from_torch(dtype).name for name, dtype in numerics.others if name in own},
            arithmetic={label: how for label, how in numerics.arithmetic if label in asked},
            computed=None if numerics.computed is None else dict(numerics.computed),
            loras=self.loras,
            inputs=_plain(inputs),
            outputs=_plain(outputs),
            next=None if following is None else _introduction(following.remote),
            options={"measure": True} if measure else {},
        )


@dataclass
class Leg:
    """Hops that hand over to each other directly; the host sends to the first and hears from the last.

    Attributes:
        routes: how the state gets into each hop, and out of the last one.
    """

    hops: list[RemoteHop]
    routes: list[Route]
    encoder: Streams
    decoder: Streams

    def go_on_from(self, before: Leg) -> bool:
        """Take over the streams of ``before``, if it was the same; whether it was."""
        alike = self.hops == before.hops
        if not (alike and self.encoder.alike(before.encoder) and self.decoder.alike(before.decoder)):
            return False
        self.encoder, self.decoder = before.encoder, before.decoder
        return True

    def crossed(self, payload: Payload, hops: Sequence[HopStats], decode_ms: float) -> list[RouteStats]:
        """What a step cost on each route: what the host did at both ends of the leg, and the workers in between."""
        raw, coded = (
            [payload.raw_bytes, *(h.out_raw for h in hops)],
            [payload.coded_bytes, *(h.out_coded for h in hops)],
        )
        encode, decode = [payload.ms, *(h.encode_ms for h in hops)], [*(h.decode_ms for h in hops), decode_ms]
        return [RouteStats(*c) for c in zip(self.routes, raw, coded, encode, decode, strict=True)]


class CannotReachNeighbour(Exception):
    """A worker cannot hand over to hop number ``hop``."""

    def __init__(self, hop: int, cause: MeshError) -> None:
        self.hop = hop
        super().__init__(cause.message)


def _plain(choices: Mapping[str, CodecChoice]) -> dict[str, Any]:
    return {name: {"codec": c.codec, "settings": dict(c.settings)} for name, c in choices.items()}


def _introduction(remote: Remote) -> dict[str, Any]:
    return {"address": remote.address.text, "server_key": remote.address.server_key, "session": remote.session}
