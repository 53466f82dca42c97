"""LoRAs that arrive at a worker in pieces: written beside the library, verified as a whole, then taken into it.

A transfer that breaks off leaves its draft; the same host goes on from there. Nothing of a draft is ever used. Tensors
that are in the library already are copied from there.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator
from pathlib import Path

from blake3 import blake3

from mesh_core import wire
from mesh_core.errors import LoraError, MeshError, WireMalformed
from mesh_core.loras.bounds import SENT_HEADER, read_lora_header
from mesh_core.loras.library import LoraLibrary
from mesh_core.loras.part import lora_in
from mesh_core.loras.stored import TensorFile
from mesh_core.loras.tensors import check_finite
from mesh_core.model.library import Checkpoint
from mesh_core.system.forks import hash_threads
from mesh_core.system.logs import logger
from mesh_core.worker.lora_drafts import Draft, Drafts
from mesh_core.worker.lora_reuse import known_tensors

log = logger(__name__)

_BLOCK = 16 << 20

FindModel = Callable[[str, str], Checkpoint]

Intake = Generator[None, None, int]
"""Work that lets others in between its pieces, and in the end says how much of a file is here."""


class Receiver:
    """Takes in LoRAs of many hosts: `offer`, then `chunk` until all is here. For one thread; see `Turns`.

    Args:
        library: where whole ones are kept; drafts lie in its folder ``incoming``.
        find_model: the checkpoint of a family and structure, against which a LoRA is checked.
    """

    def __init__(self, library: LoraLibrary, find_model: FindModel) -> None:
        self._loras, self._find_model = library, find_model
        self._drafts = Drafts(library.received)

    def offer(self, owner: str, offer: wire.Offer) -> Intake:
        """How much of the file is here already.

        Raises:
            LoraTooLarge: it cannot be kept.
            LoraError: the library's folder cannot be written.
            CheckpointMismatch: the model that it is for is not here.
        """
        if self._loras.received.path_of(offer.lora).is_file():
            return offer.size
        checkpoint = self._find_model(offer.family, offer.structure)
        try:
            draft = self._drafts.begin(owner, offer, checkpoint)
        except OSError as error:
            raise _cannot_write(self._drafts.folder, error) from error
        return (yield from self._go_on(draft))

    def chunk(self, owner: str, message: wire.Chunk, data: memoryview) -> Intake:
        """Take bytes; how much of the file is here then. Bytes that were here already are passed over.

        Raises:
            WireMalformed: nothing was offered, or bytes that do not follow.
            LoraError: the disk is full, or the whole is not what was offered; the draft is gone.
        """
        draft = self._drafts.of(owner, message.lora)
        if draft is None:
            raise WireMalformed("A piece of a LoRA came that was not offered.", hint="offer it again")
        if self._loras.received.path_of(message.lora).is_file():
            self._drafts.end(draft, delete=True)
            return draft.offer.size
        have = draft.have
        if message.offset < have:
            return have
        if message.offset > have or not data.nbytes or have + data.nbytes > draft.offer.size:
            raise WireMalformed(f"A piece at {message.offset} does not follow the {have} bytes that are here.")
        return (yield from self._go_on(draft, data))

    def _go_on(self, draft: Draft, data: memoryview | None = None) -> Intake:
        """Append ``data`` and the tensors that follow as long as they are here already; take the whole in."""
        try:
            if data is not None:
                self._drafts.append(draft, data)
            if draft.known is None and draft.have:
                draft.known = known_tensors(draft.path, draft.have, draft.offer.size, self._loras, draft.checkpoint)
            while draft.known is not None and draft.have < draft.offer.size:
                found = draft.known.after(draft.have)
                if not found:
                    break
                yield
                self._drafts.append(draft, found)
            if draft.have == draft.offer.size:
                yield from self._finish(draft)
        except OSError as error:
            self._drafts.end(draft, delete=True)
            raise _cannot_write(draft.path, error) from error
        except MeshError:
            self._drafts.end(draft, delete=True)
            raise
        return draft.have

    def _finish(self, draft: Draft) -> Generator[None, None, None]:
        offer = draft.offer
        verified = yield from self._verify(draft)
        self._loras.received.add(verified, offer.lora, offer.name[:200], offer.family)
        self._drafts.end(draft, delete=True)
        log.info("received the LoRA %s (%s), %.1f MB", offer.name, offer.lora[:12], offer.size / 1e6)

    def _verify(self, draft: Draft) -> Generator[None, None, TensorFile]:
        hasher = blake3(max_threads=hash_threads())
        with draft.path.open("rb") as file:
            while block := file.read(_BLOCK):
                hasher.update(block)
                yield
        if hasher.hexdigest() != draft.offer.digest:
            raise LoraError(
                f"What arrived of {draft.offer.name!r} does not have the hash that it was offered with.",
                hint="the same again; if it happens again, the file changes while it is sent",
            )
        tensors = TensorFile(read_lora_header(draft.path, SENT_HEADER), remember=False)
        lora = lora_in(tensors, draft.checkpoint.spec, draft.offer.name)
        yield
        for name, tensor in tensors.read_through():
            check_finite(tensor, f"The tensor {name} of {draft.offer.name!r}")
            yield
        if lora.id != draft.offer.lora:
            raise LoraError(f"{draft.offer.name!r} is not the LoRA that it was offered as.", hint="the same again")
        return tensors


def _cannot_write(path: Path, error: OSError) -> LoraError:
    full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    reason = "the disk is full" if full else error.strerror or str(error)
    return LoraError(
        f"A LoRA cannot be kept in {path.parent.name} of this worker: {reason}.",
        hint="free some space there, or put the file into the worker's LoRA folder",
    )
