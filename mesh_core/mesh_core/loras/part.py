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

from blake3 import blake3

from mesh_codec.payload import bytes_of
from mesh_core.errors import LoraError
from mesh_core.loras.patch import Lora, Patch, Rows
from mesh_core.loras.tensors import Source, TensorFile
from mesh_core.model.checkpoint import CheckpointHeader, read_header
from mesh_core.model.spec import ModelSpec

MARK = "mesh-lora-1"
_MOST_PATCHES = 100_000


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
        hasher = blake3(self._head, max_threads=blake3.AUTO)
        for source in self._sources:
            hasher.update(bytes_of(source.load()))
        return hasher.hexdigest()


def is_part(header: CheckpointHeader) -> bool:
    return header.metadata.get("format") == MARK


def read_part(path: Path, spec: ModelSpec, name: str = "") -> Lora:
    """The LoRA in a file that a `Part` described; nothing in it is trusted.

    Raises:
        LoraError: not such a file, or one that does not fit the model.
        CheckpointError: no safetensors file.
    """
    return lora_in(TensorFile(read_header(path)), spec, name)


def lora_in(file: TensorFile, spec: ModelSpec, name: str = "") -> Lora:
    """See `read_part`."""
    header, path = file.header, file.path
    try:
        listed = json.loads(header.metadata["patches"]) if is_part(header) else None
        if not isinstance(listed, list) or len(listed) > _MOST_PATCHES:
            raise ValueError("no list of patches")
        patches = [_read_patch(item, file) for item in listed]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LoraError(f"{path.name} is no LoRA in the mesh's form: {error}.", hint="send it again") from error
    return Lora.of(name or path.stem, spec, patches)


def _read_patch(item: Any, file: TensorFile) -> Patch:
    algorithm, target, alpha, narrow, roles = item
    rows = []
    for parameter, start, stop in target:
        if type(parameter) is not str or type(start) is not int or type(stop) is not int:
            raise ValueError("rows that are none")
        rows.append(Rows(parameter, start, stop))
    if type(algorithm) is not str or type(alpha) not in (int, float, type(None)) or not isinstance(roles, dict):
        raise ValueError("a patch that is none")
    if narrow is not None and (len(narrow) != 3 or any(type(n) is not int for n in narrow)):
        raise ValueError("a part of a weight that is none")
    tensors: dict[str, Source] = {}
    for role, index in roles.items():
        if type(index) is not int or str(index) not in file.header.tensors:
            raise ValueError(f"tensor {str(index)[:20]} is missing")
        tensors[role] = file.source(str(index))
    part = None if narrow is None else (narrow[0], narrow[1], narrow[2])
    return Patch(algorithm, tuple(rows), tensors, alpha, part)
