"""A LoRA, or its part for one worker, as a safetensors file in canonical form: what crosses the network and is kept.

The bytes follow from the content alone, so two hosts that send the same part send the same file, and a transfer that
broke off goes on where it stopped.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from mesh_codec.memory import bytes_of
from mesh_core.errors import LoraError
from mesh_core.loras.bounds import MOST_PATCHES, SENT_HEADER, read_lora_header
from mesh_core.loras.lora import Lora
from mesh_core.loras.patch import Patch, Rows
from mesh_core.loras.stored import TensorFile
from mesh_core.loras.tensors import Source
from mesh_core.model.checkpoint import CheckpointHeader
from mesh_core.model.spec import ModelSpec
from mesh_core.system.forks import hash_threads

MARK = "mesh-lora-1"

_PATCHES = msgspec.json.Decoder(
    list[tuple[str, list[tuple[str, int, int]], int | float | None, tuple[int, int, int] | None, dict[str, int]]]
)
"""See `Patch.facts`, and the index of each role's tensor. Read by this, what has another form is not built at all."""


class Part:
    """The file of a LoRA, made piece by piece without holding it.

    Attributes:
        head_nbytes: bytes before the first tensor's. Who has them knows the hash of every tensor and where it lies.
    """

    def __init__(self, lora: Lora) -> None:
        self.lora = lora
        self._sources: list[Source] = []
        patches = json.dumps(self._patches())
        hashes = json.dumps([source.digest() for source in self._sources])
        entries: dict[str, Any] = {"__metadata__": {"format": MARK, "patches": patches, "hashes": hashes}}
        position = 0
        for name, source in zip(self._names(), self._sources, strict=True):
            end = position + source.nbytes
            entries[name] = {"dtype": source.dtype, "shape": list(source.shape), "data_offsets": [position, end]}
            position = end
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._head = struct.pack("<Q", len(header)) + header
        self.head_nbytes = len(self._head)
        self.nbytes = self.head_nbytes + position

    def _patches(self) -> list[Any]:
        listed = []
        for patch in self.lora.patches:
            roles = {}
            for role, source in sorted(patch.tensors.items()):
                roles[role] = len(self._sources)
                self._sources.append(source)
            listed.append([*patch.facts(), roles])
        return listed

    def _names(self) -> Iterator[str]:
        return (str(i) for i in range(len(self._sources)))

    def read(self, start: int, size: int) -> bytes:
        """At most ``size`` bytes of the file from ``start``; fewer only at its end.

        Raises:
            LoraError: a file that the LoRA comes from changed.
        """
        found = bytearray(self._head[start : start + size])
        position = len(self._head)
        for source in self._sources:
            if len(found) == size:
                break
            low, end = start + len(found) - position, position + source.nbytes
            if 0 <= low < source.nbytes:
                found += source.read(low, min(size - len(found), source.nbytes - low))
            position = end
        return bytes(found)

    def digest(self) -> str:
        """BLAKE3 of the whole file, in hex."""
        hasher = blake3(self._head, max_threads=hash_threads())
        for source in self._sources:
            hasher.update(bytes_of(source.load()))
        return hasher.hexdigest()


def is_part(header: CheckpointHeader) -> bool:
    """Whether a file says that it is in this form; the tensors in it may still not be."""
    return header.metadata.get("format") == MARK


def read_part(path: Path, spec: ModelSpec, name: str = "") -> Lora:
    """The LoRA in a file that a `Part` described; nothing in it is trusted.

    Raises:
        LoraError: not such a file, or one that does not fit the model.
        CheckpointError: no safetensors file.
    """
    return lora_in(TensorFile(read_lora_header(path, SENT_HEADER)), spec, name)


def lora_in(file: TensorFile, spec: ModelSpec, name: str = "") -> Lora:
    """See `read_part`. Every tensor of the file belongs to exactly one patch, so that work on all patches is bounded
    by the file's size."""
    header, path = file.header, file.path
    try:
        if not is_part(header) or header.metadata.keys() != {"format", "patches", "hashes"}:
            raise ValueError("its metadata is another one")
        text = header.metadata["patches"]
        # Two of a patch, and one of each of its rows.
        listed = _PATCHES.decode(text) if text.count("[") <= 4 * MOST_PATCHES else []
        indices = [index for *_, roles in listed for index in roles.values()]
        if indices != list(range(len(header.tensors))):
            raise ValueError("there are more patches than a LoRA has, or tensors that are not each of one of them")
        patches = [_patch(*item, file) for item in listed]
    except (ValueError, KeyError, RecursionError) as error:
        raise LoraError(f"{path.name} is no LoRA in the mesh's form: {error}.", hint="send it again") from error
    return Lora.of(name or path.stem, spec, patches)


def _patch(
    algorithm: str,
    target: list[tuple[str, int, int]],
    alpha: int | float | None,
    narrow: tuple[int, int, int] | None,
    roles: dict[str, int],
    file: TensorFile,
) -> Patch:
    tensors: dict[str, Source] = {role: file.source(str(index)) for role, index in roles.items()}
    return Patch(algorithm, tuple(Rows(*rows) for rows in target), tensors, alpha, narrow)
