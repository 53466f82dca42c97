"""The LoRAs of a worker: looking them up for sessions and for hosts that ask, and taking in those that hosts send."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

from mesh_core import wire
from mesh_core.errors import LoraMissing, LoraUnmatched, WireTooLarge
from mesh_core.loras.library import LoraLibrary
from mesh_core.loras.lora import Applied
from mesh_core.model.library import Checkpoint, CheckpointLibrary
from mesh_core.model.spans import BlockSpan
from mesh_core.system.logs import logger
from mesh_core.transport.base import Peer
from mesh_core.worker.agreement import span_of
from mesh_core.worker.lora_upload import Receiver
from mesh_core.worker.quota import QUOTA
from mesh_core.worker.replies import Replies
from mesh_core.worker.session import WorkerSession

log = logger(__name__)


class WorkerLoras:
    """What a worker does with LoRAs. Any thread may call it.

    Args:
        library: the checkpoints here, against which LoRAs are matched.
        preset: names and strengths of those that every session has before its own.
    """

    def __init__(
        self,
        lora_library: LoraLibrary,
        library: CheckpointLibrary,
        replies: Replies,
        preset: Sequence[tuple[str, float]] = (),
    ) -> None:
        self.lora_library = lora_library
        self._library, self._replies, self._preset = library, replies, preset
        self._receiver = Receiver(lora_library, library.like)
        self._lock = threading.Lock()

    def listing(self, peer: Peer, message: wire.ListLoras) -> None:
        """Say which LoRAs are kept here, whatever model they are for."""
        self._replies.send(peer.route, wire.LorasListed(message.id, self.lora_library.listing()))

    def discard(self, peer: Peer, message: wire.Discard) -> None:
        """Delete one that a host sent."""
        self.lora_library.received.remove(message.lora)
        self._replies.send(peer.route, wire.Ok(message.id))

    def seek(self, peer: Peer, message: wire.Seek) -> None:
        """Say which LoRAs are here. Runs in a loading thread: files whose content is not known yet are read."""
        _check_count(message.loras)
        checkpoint = self._library.like(message.family, message.structure)
        span = span_of(checkpoint, message.span, may_be_empty=True)
        parameters = checkpoint.spec.parameters_of(span).keys()
        held = [
            i
            for i, use in enumerate(message.loras)
            if self.lora_library.find(use["id"], use["outline"], checkpoint, parameters) is not None
        ]
        self._replies.send(peer.route, wire.Sought(message.id, held))

    def offer(self, peer: Peer, message: wire.Offer) -> Iterator[None]:
        """A host wants to send one: say how much of it is here already."""
        have = yield from self._receiver.offer(peer.key, message)
        self._replies.send(peer.route, wire.Offered(message.id, have))

    def chunk(self, peer: Peer, message: wire.Chunk, buffers: list[memoryview]) -> Iterator[None]:
        """Take in a piece of one, and say how much is here then."""
        have = yield from self._receiver.chunk(peer.key, message, buffers[0])
        self._replies.send(peer.route, wire.Offered(message.id, have))

    def resolve(
        self, uses: Sequence[dict[str, Any]], checkpoint: Checkpoint, span: BlockSpan, held: Sequence[Applied] = ()
    ) -> tuple[Applied, ...]:
        """The LoRAs that a message names, restricted to a span, in order; the preset ones before them.

        Args:
            held: those that the span has now; they need not be looked for.

        Raises:
            LoraMissing: one is not here (any more).
            WireTooLarge: more than anybody means.
        """
        _check_count(uses)
        parameters = checkpoint.spec.parameters_of(span).keys()
        found: list[Applied] = []
        for name, strength in self._preset:
            try:
                found.append(Applied(self.lora_library.named(name, checkpoint, parameters), strength))
            except LoraUnmatched as error:
                log.info("the preset LoRA %s is not for %s: %s", name, checkpoint.spec.family, error.message)
        known = {a.lora.id: a.lora for a in held}
        for use in uses:
            lora = known.get(use["id"])
            if lora is None and use["id"]:
                lora = self.lora_library.find(use["id"], use["outline"], checkpoint, parameters)
                if lora is None:
                    raise LoraMissing(
                        f"The LoRA {use['name'][:100]!r} ({use['id'][:12]}) is not here.", hint="send it again"
                    )
            elif lora is None:
                lora = self.lora_library.named(use["name"], checkpoint, parameters)
            found.append(Applied(lora, use["strength"], use["base"]))
        return tuple(a for a in found if a.lora)

    def keep(self, session: WorkerSession, applied: tuple[Applied, ...]) -> None:
        """The session uses these from now on instead of what it had; their files stay."""
        self.lora_library.received.hold([a.lora for a in applied])
        with self._lock:
            before, session.loras = session.loras, applied
        self.lora_library.received.let_go([a.lora for a in before])

    def forget(self, session: WorkerSession) -> None:
        """The session ended."""
        self.keep(session, ())


def _check_count(uses: Sequence[dict[str, Any]]) -> None:
    if len(uses) > QUOTA.loras:
        raise WireTooLarge(f"{len(uses)} LoRAs at once; at most {QUOTA.loras} are accepted.", hint="fewer LoRAs")
