"""LoRAs that arrive at a worker in pieces: written beside the library, verified as a whole, then taken into it.

A transfer that breaks off leaves its draft; the same host goes on from there. Nothing of a draft is ever used. Tensors
that are in the library already are copied from there.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import time

from blake3 import blake3

from mesh_core import wire
from mesh_core.errors import LoraError, WireMalformed, WireTooLarge
from mesh_core.loras.library import LoraLibrary
from mesh_core.loras.part import lora_in
from mesh_core.loras.stored import TensorFile
from mesh_core.loras.tensors import check_finite
from mesh_core.model.checkpoint import read_header
from mesh_core.model.library import Checkpoint
from mesh_core.system.logs import logger
from mesh_core.worker.lora_reuse import KnownTensors, known_tensors

log = logger(__name__)

_STALE = 24 * 3600.0
"""Seconds after which a draft that nobody goes on with is removed."""

_MOST_DRAFTS = 4
"""Transfers of one host at once."""

_BLOCK = 16 << 20

FindModel = Callable[[str, str], Checkpoint]


@dataclass
class _Draft:
    offer: wire.Offer
    checkpoint: Checkpoint
    path: Path
    lock: threading.Lock
    known: KnownTensors | None = None


class Receiver:
    """Takes in LoRAs of many hosts at once: `offer`, then `chunk` until all is here. Thread-safe.

    Args:
        library: where whole ones are kept; drafts lie in its folder ``incoming``.
        find_model: the checkpoint of a family and structure, against which a LoRA is checked.
    """

    def __init__(self, library: LoraLibrary, find_model: FindModel) -> None:
        self._loras, self._find_model = library, find_model
        self._folder = library.received.folder / "incoming"
        self._drafts: dict[tuple[str, str], _Draft] = {}
        self._lock = threading.Lock()

    def offer(self, owner: str, offer: wire.Offer) -> int:
        """How much of the file is here already.

        Raises:
            LoraTooLarge: it cannot be kept.
            LoraError: the library's folder cannot be written.
            CheckpointMismatch: the model that it is for is not here.
        """
        if self._loras.received.path_of(offer.lora).is_file():
            return offer.size
        checkpoint = self._find_model(offer.family, offer.structure)
        self._loras.received.make_room(offer.size)
        self._tidy(offer.size)
        name = blake3(f"{owner} {offer.lora} {offer.digest}".encode()).hexdigest()[:32]
        with self._lock:
            mine = [key for key in self._drafts if key[0] == owner and key[1] != offer.lora]
            if len(mine) >= _MOST_DRAFTS:
                raise WireTooLarge(f"{len(mine)} LoRAs of one host are on their way already.", hint="one after another")
            draft = _Draft(offer, checkpoint, self._folder / f"{name}.draft", threading.Lock())
            self._drafts[owner, offer.lora] = draft
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            have = draft.path.stat().st_size if draft.path.exists() else 0
            if have > offer.size:
                draft.path.unlink()
                return 0
            have = self._go_on(draft, have)
        except OSError as error:
            self._drop(owner, draft)
            raise _cannot_write(self._folder, error) from error
        return self._finish(owner, draft) if have == offer.size else have

    def chunk(self, owner: str, message: wire.Chunk, data: memoryview) -> int:
        """Take bytes; how much of the file is here then. Bytes that were here already are passed over.

        Raises:
            WireMalformed: nothing was offered, or bytes that do not follow.
            LoraError: the disk is full, or the whole is not what was offered; the draft is gone.
        """
        draft = self._drafts.get((owner, message.lora))
        if draft is None:
            raise WireMalformed("A piece of a LoRA came that was not offered.", hint="offer it again")
        with draft.lock:
            if self._loras.received.path_of(message.lora).is_file():
                self._drop(owner, draft, delete=True)
                return draft.offer.size
            have = draft.path.stat().st_size if draft.path.exists() else 0
            if message.offset < have:
                return have
            if message.offset > have or not data.nbytes or have + data.nbytes > draft.offer.size:
                raise WireMalformed(f"A piece at {message.offset} does not follow the {have} bytes that are here.")
            try:
                with draft.path.open("ab") as file:
                    file.write(data)
                have = self._go_on(draft, have + data.nbytes)
            except OSError as error:
                self._drop(owner, draft, delete=True)
                raise _cannot_write(draft.path, error) from error
            return self._finish(owner, draft) if have == draft.offer.size else have

    def _go_on(self, draft: _Draft, have: int) -> int:
        """Append the tensors that follow at ``have`` as long as they are here already; how much is here then."""
        if draft.known is None and have:
            draft.known = known_tensors(draft.path, have, draft.offer.size, self._loras, draft.checkpoint)
        if draft.known is None:
            return have
        while have < draft.offer.size and (data := draft.known.after(have)):
            with draft.path.open("ab") as file:
                file.write(data)
            have += data.nbytes
        return have

    def _finish(self, owner: str, draft: _Draft) -> int:
        offer = draft.offer
        try:
            verified = self._verify(draft)
            self._loras.received.make_room(offer.size)
            self._loras.received.add(verified, offer.lora, offer.name, offer.family)
        except OSError as error:
            raise _cannot_write(draft.path, error) from error
        finally:
            self._drop(owner, draft, delete=True)
        log.info("received the LoRA %s (%s), %.1f MB", offer.name, offer.lora[:12], offer.size / 1e6)
        return offer.size

    def _verify(self, draft: _Draft) -> TensorFile:
        hasher = blake3(max_threads=blake3.AUTO)
        with draft.path.open("rb") as file:
            while block := file.read(_BLOCK):
                hasher.update(block)
        if hasher.hexdigest() != draft.offer.digest:
            raise LoraError(
                f"What arrived of {draft.offer.name!r} does not have the hash that it was offered with.",
                hint="the same again; if it happens again, the file changes while it is sent",
            )
        tensors = TensorFile(read_header(draft.path), remember=False)
        lora = lora_in(tensors, draft.checkpoint.spec, draft.offer.name)
        for patch in lora.patches:
            for role, source in patch.tensors.items():
                check_finite(source.load(), f"{draft.offer.name!r} ({patch.target[0].parameter} {role})")
        if lora.id != draft.offer.lora:
            raise LoraError(f"{draft.offer.name!r} is not the LoRA that it was offered as.", hint="the same again")
        return tensors

    def _drop(self, owner: str, draft: _Draft, *, delete: bool = False) -> None:
        with self._lock:
            self._drafts.pop((owner, draft.offer.lora), None)
        if delete:
            with suppress(OSError):  # a folder that cannot be written was reported already
                draft.path.unlink(missing_ok=True)

    def _tidy(self, size: int) -> None:
        """Remove drafts that nobody goes on with: old ones, and as many others as are over the library's limit."""
        active = {draft.path for draft in list(self._drafts.values())}
        with suppress(OSError):  # another thread may have taken one over just now
            files = [(p.stat().st_mtime, p.stat().st_size, p) for p in self._folder.glob("*.draft") if p not in active]
            total = size + sum(length for _, length, _ in files)
            for changed, length, path in sorted(files):
                if time() - changed > _STALE or total > self._loras.received.limit:
                    path.unlink()
                    total -= length


def _cannot_write(path: Path, error: OSError) -> LoraError:
    full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    reason = "the disk is full" if full else error.strerror or str(error)
    return LoraError(
        f"A LoRA cannot be kept in {path.parent.name} of this worker: {reason}.",
        hint="free some space there, or put the file into the worker's LoRA folder",
    )
