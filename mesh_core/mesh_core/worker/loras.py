"""The LoRAs of a worker's sessions: looking them up, taking them in, changing those of a session.

Knows messages and sessions; how messages come and go is the worker's.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

from mesh_core import wire
from mesh_core.errors import LoraMissing, LoraUnmatched, PlanError, SessionUnknown, TransportTimeout
from mesh_core.loras.library import LoraLibrary
from mesh_core.loras.lora import Applied, Lora
from mesh_core.model.library import Checkpoint, CheckpointLibrary
from mesh_core.model.spans import BlockSpan
from mesh_core.transport.base import Frame, Peer
from mesh_core.worker.executor import Executor
from mesh_core.worker.lora_upload import Receiver
from mesh_core.worker.session import HostedSession
from mesh_core.worker.stages import StageStore

log = logging.getLogger(__name__)

Send = Callable[[bytes, wire.Message, list[Frame]], None]
Owned = Callable[[Peer, bytes], HostedSession]

_STOPS_WITHIN = 60.0
"""Seconds for a step that nobody waits for any more to come to the end of its block."""


@dataclass
class LoraHosting:
    """What a worker does with LoRAs. ``default``: those of sessions that ask for none of their own."""

    lora_library: LoraLibrary
    library: CheckpointLibrary
    stages: StageStore
    executor: Executor
    send: Send
    owned: Owned
    default: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        self.receiver = Receiver(self.lora_library, self.library.like)
        self._held: dict[bytes, tuple[Applied, ...]] = {}
        self._lock = threading.Lock()

    def listing(self, peer: Peer, message: wire.Shelf) -> None:
        self.send(peer.route, wire.Shelved(message.id, self.lora_library.listing()), [])

    def discard(self, peer: Peer, message: wire.Discard) -> None:
        self.lora_library.received.remove(message.lora)
        self.send(peer.route, wire.Ok(message.id), [])

    def seek(self, peer: Peer, message: wire.Seek) -> None:
        """Say which LoRAs are here. Runs in a loading thread: files whose content is not known yet are read."""
        checkpoint = self.library.like(message.family, message.structure)
        span = BlockSpan(*message.span)
        if span.stop > checkpoint.spec.blocks:
            raise PlanError(
                f"Span {span} is not in {checkpoint.name}.", hint=f"a span within :{checkpoint.spec.blocks}"
            )
        parameters = checkpoint.spec.parameters_of(span).keys()
        held = [
            i
            for i, use in enumerate(message.loras)
            if self.lora_library.find(use["id"], use["outline"], checkpoint, parameters) is not None
        ]
        self.send(peer.route, wire.Sought(message.id, held), [])

    def offer(self, peer: Peer, message: wire.Offer) -> None:
        have = self.receiver.offer(peer.key, message)
        self.send(peer.route, wire.Offered(message.id, have), [])

    def chunk(self, peer: Peer, message: wire.Chunk, buffers: list[memoryview]) -> None:
        have = self.receiver.chunk(peer.key, message, buffers[0])
        self.send(peer.route, wire.Offered(message.id, have), [])

    def resolve(
        self, uses: Sequence[dict[str, Any]], checkpoint: Checkpoint, span: BlockSpan, held: Sequence[Applied] = ()
    ) -> tuple[Applied, ...]:
        """The LoRAs that a message names, restricted to a span, in order; the preset ones before them.

        Args:
            held: those that the span has now; they need not be looked for.

        Raises:
            LoraMissing: one is not here (any more).
        """
        parameters = checkpoint.spec.parameters_of(span).keys()
        found: list[Applied] = []
        for name, strength in self.default:
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

    def adjust(self, peer: Peer, message: wire.Adjust) -> None:
        """Give a session other LoRAs. Runs in a loading thread, beside the steps of other sessions."""
        began = monotonic()
        session = self.owned(peer, message.session)
        held = self._held.get(session.id, ())
        applied = self.resolve(message.loras, session.checkpoint, session.loaded.stage.span, held)
        self._quiet(session)
        session.loaded = self.stages.adjust(session.checkpoint, session.loaded, applied)
        try:
            self.owned(peer, message.session)
        except SessionUnknown:
            # It ended meanwhile, and gave back the stage under the name that it had before.
            self.stages.release(session.loaded.key)
            raise
        self.keep(session, applied)
        info = {"bytes_read": session.loaded.bytes_read, "seconds": monotonic() - began, "loaded": self.stages.nbytes}
        self.send(peer.route, wire.Opened(message.id, info), [])

    def keep(self, session: HostedSession, applied: tuple[Applied, ...]) -> None:
        """The session uses these from now on; their files stay."""
        loras: list[Lora] = [a.lora for a in applied]
        self.lora_library.received.hold(loras)
        with self._lock:
            before = self._held.get(session.id, ())
            self._held[session.id] = applied
        self.lora_library.received.let_go([a.lora for a in before])

    def forget(self, session: HostedSession) -> None:
        with self._lock:
            before = self._held.pop(session.id, ())
        self.lora_library.received.let_go([a.lora for a in before])

    def _quiet(self, session: HostedSession) -> None:
        """Wait until nothing of the session computes: a step that was given up may still be in its last block."""
        self.executor.cancel(session.id)
        end = monotonic() + _STOPS_WITHIN
        while session.id in self.executor.busy():
            if monotonic() > end:
                raise TransportTimeout("A step of the session does not stop.", hint="the same again")
            sleep(0.001)
