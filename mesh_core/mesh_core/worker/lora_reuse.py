"""What a worker need not be sent of a LoRA: tensors that it has in others, above all in a smaller part of the same one.

They are found by their hashes in the head of the arriving file; how it arrives is not known here.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from blake3 import blake3

from mesh_codec.memory import bytes_of
from mesh_core.errors import CheckpointError, LoraError
from mesh_core.loras.bounds import SENT_HEADER
from mesh_core.loras.library import LoraLibrary
from mesh_core.loras.stored import TensorOnDisk
from mesh_core.model.library import Checkpoint
from mesh_core.model.safetensors import check_header_size, parse_header
from mesh_core.system.forks import hash_threads
from mesh_core.system.logs import logger

log = logger(__name__)

_HASHES = msgspec.json.Decoder(list[str])

Stretch = tuple[int, int, str]


class KnownTensors:
    """The stretches of an arriving file of ``size`` bytes whose content is here.

    Args:
        stretches: (start, stop, hash) of what the file says that it holds.
        tensors: of those, by hash, what is here.
    """

    def __init__(self, size: int, stretches: Sequence[Stretch], tensors: Mapping[str, TensorOnDisk]) -> None:
        def here(start: int, stop: int, digest: str) -> bool:
            return digest in tensors and stop - start == tensors[digest].nbytes and start > 0 and stop <= size

        self._stretches, self._tensors = sorted(s for s in stretches if here(*s)), dict(tensors)
        self._starts = [start for start, _, _ in self._stretches]

    def after(self, position: int) -> memoryview | None:
        """Bytes that follow at ``position``, up to the end of a tensor; None if those are not here."""
        index = bisect_right(self._starts, position) - 1
        if index < 0 or position >= self._stretches[index][1]:
            return None
        start, _, digest = self._stretches[index]
        source = self._tensors.get(digest)
        if source is None:
            return None
        try:
            data = bytes_of(source.load())
            if blake3(data, max_threads=hash_threads()).hexdigest() == digest:
                return data[position - start :]
            log.warning("%s is damaged: what it holds is sent again", source.file.path)
        except LoraError as error:
            log.info("what a LoRA that was here holds is sent again: %s", error)
        del self._tensors[digest]
        return None


def known_tensors(
    draft: Path, have: int, size: int, library: LoraLibrary, checkpoint: Checkpoint
) -> KnownTensors | None:
    """What is here of a file of ``size`` bytes, of which ``have`` lie in ``draft``; None while its head is not whole.

    Nothing in the head is trusted: at worst the file is not what was offered, which its own hash shows.

    Raises:
        CheckpointUnrecognised: its head is larger than a LoRA's.
    """
    with draft.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if len(start) == 8:
            check_header_size(length, SENT_HEADER, "What arrives")
        if have < 8 + length:
            return None
        stretches = _stretches(file.read(length), 8 + length)
    hashes = {digest for _, _, digest in stretches}
    return KnownTensors(size, stretches, library.tensors(hashes, checkpoint) if hashes else {})


def _stretches(head: bytes, offset: int) -> list[Stretch]:
    try:
        entries, metadata = parse_header(head, "what arrives")
        hashes = _HASHES.decode(metadata["hashes"])
        places = [(entries[str(i)].data_offsets, digest) for i, digest in enumerate(hashes)]
    except (CheckpointError, msgspec.DecodeError, KeyError) as error:
        log.debug("the head of a LoRA says nothing of its tensors: %r", error)
        return []
    return [(offset + begin, offset + end, digest) for (begin, end), digest in places]
