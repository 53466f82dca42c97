"""LoRAs on their way to a worker: the files that hold what has come, and the room that each host may take with them.

What was announced is reserved. Whatever lies on the disk, whole or not, counts against the library's limit.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, time

from blake3 import blake3

from mesh_core import wire
from mesh_core.errors import LoraTooLarge, WireTooLarge
from mesh_core.loras.received import ReceivedLoras
from mesh_core.model.library import Checkpoint
from mesh_core.system.logs import logger
from mesh_core.worker.lora_reuse import KnownTensors

log = logger(__name__)

_STALE = 24 * 3600.0
"""Seconds after which the file of a transfer that broke off is removed."""

_SILENT = 120.0
"""Seconds without a piece after which a transfer gives way to others; it goes on when it is offered again."""

_MOST_OF_A_HOST = 4
"""Transfers of one host at once."""

_MOST_LEFT = 64
"""Files of transfers that broke off."""

_PARTS = 100
"""Into which the library is divided when room is made."""


@dataclass
class Draft:
    """One LoRA on its way.

    Attributes:
        have: bytes of it that are in the file at ``path``.
        room: bytes that others made room for.
    """

    owner: str
    offer: wire.Offer
    checkpoint: Checkpoint
    path: Path
    have: int = 0
    room: int = 0
    known: KnownTensors | None = None
    heard: float = field(default_factory=monotonic)


class Drafts:
    """Thread-safe.

    Args:
        received: the library that they are for, in whose folder ``incoming`` they lie.
    """

    def __init__(self, received: ReceivedLoras) -> None:
        self.folder = received.folder / "incoming"
        self._received = received
        self._drafts: dict[tuple[str, str], Draft] = {}
        self._lock = threading.RLock()

    def begin(self, owner: str, offer: wire.Offer, checkpoint: Checkpoint) -> Draft:
        """Reserve room, and go on with what came of it earlier.

        Raises:
            LoraTooLarge: there is no room, or not for one host.
            WireTooLarge: too many of this host are on their way.
            OSError: the folder cannot be written.
        """
        name = blake3(f"{owner} {offer.lora} {offer.digest}".encode()).hexdigest()[:32]
        draft = Draft(owner, offer, checkpoint, self.folder / f"{name}.draft")
        with self._lock:
            self._reserve(draft)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._tidy(keep=draft.path)
                have = draft.path.stat().st_size if draft.path.exists() else 0
                if have > offer.size:
                    draft.path.unlink()
                    have = 0
                draft.have = draft.room = have
            except OSError:
                self.end(draft)
                raise
            return draft

    def of(self, owner: str, lora: str) -> Draft | None:
        """What ``owner`` offered of that hash and has not ended."""
        draft = self._drafts.get((owner, lora))
        if draft is not None:
            draft.heard = monotonic()
        return draft

    def append(self, draft: Draft, data: memoryview) -> None:
        """Write what follows; makes room for it.

        Raises:
            LoraTooLarge: there is none any more.
            OSError: the file cannot be written.
        """
        with self._lock:
            if draft.have + data.nbytes > draft.room:
                self._widen(draft, draft.have + data.nbytes)
            with draft.path.open("ab") as file:
                file.write(data)
            draft.have += data.nbytes
            draft.heard = monotonic()

    def end(self, draft: Draft, *, delete: bool = False) -> None:
        """Give the room back; ``delete`` what came, too."""
        with self._lock:
            key = draft.owner, draft.offer.lora
            if self._drafts.get(key) is draft:
                del self._drafts[key]
        if delete:
            with suppress(OSError):  # a folder that cannot be written was reported already
                draft.path.unlink(missing_ok=True)

    def _widen(self, draft: Draft, room: int) -> None:
        """Have so many bytes for a draft. A bit more than are needed: looking at all files takes time."""
        room = min(room + self._received.limit // _PARTS, draft.offer.size)
        left, written = self._left(), sum(d.room for d in self._drafts.values()) - draft.room + room
        over = self._received.nbytes + written + sum(size for _, size, _ in left) - self._received.limit
        while over > 0 and left:
            _, size, path = left.pop(0)
            path.unlink(missing_ok=True)
            over -= size
        self._received.make_room(written)
        draft.room = room

    def _reserve(self, draft: Draft) -> None:
        owner, offer, limit = draft.owner, draft.offer, self._received.limit
        if offer.size > limit // 2:
            raise LoraTooLarge(
                f"A LoRA of {offer.size / 1e6:.1f} MB is more than one host may send at once to this worker's library "
                f"of {limit / 1e6:.1f} MB.",
                hint="a larger [loras] library in the worker's config.toml, or the file in its LoRA folder",
            )
        self._drafts.pop((owner, offer.lora), None)
        silent = sorted((d for d in self._drafts.values() if monotonic() - d.heard > _SILENT), key=lambda d: d.heard)
        while (problem := self._no_room(owner, offer.size)) is not None:
            if not silent:
                raise problem
            self.end(silent.pop(0))
        self._drafts[owner, offer.lora] = draft

    def _no_room(self, owner: str, size: int) -> WireTooLarge | LoraTooLarge | None:
        mine = [d.offer.size for d in self._drafts.values() if d.owner == owner]
        limit = self._received.limit
        if len(mine) >= _MOST_OF_A_HOST or sum(mine) + size > limit // 2:
            return WireTooLarge(f"{len(mine)} LoRAs of one host are on their way already.", hint="one after another")
        taken = sum(d.offer.size for d in self._drafts.values()) + self._received.nbytes_in_use
        if taken + size > limit:
            return LoraTooLarge(
                f"This worker's LoRA library is full: {taken / 1e6:.1f} of {limit / 1e6:.1f} MB are in use or on "
                "their way.",
                hint="the same later, or a larger [loras] library in the worker's config.toml",
            )
        return None

    def _left(self) -> list[tuple[float, int, Path]]:
        """Time, size and place of files that no transfer goes on with, the oldest first."""
        active = {draft.path for draft in self._drafts.values()}
        found = []
        for path in self.folder.glob("*.draft"):
            if path not in active:
                with suppress(OSError):  # somebody tidied up
                    state = path.stat()
                    found.append((state.st_mtime, state.st_size, path))
        return sorted(found)

    def _tidy(self, keep: Path) -> None:
        left = [item for item in self._left() if item[2] != keep]
        for number, (changed, _, path) in enumerate(reversed(left)):
            if number >= _MOST_LEFT or time() - changed > _STALE:
                path.unlink(missing_ok=True)
