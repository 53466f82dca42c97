"""The tensors of a LoRA in a file.

A LoRA can be larger than is comfortable to hold, so what lies in a file stays there until it is used.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from mesh_codec.dtypes import from_safetensors
from mesh_codec.memory import bytes_of
from mesh_core.errors import CheckpointError, LoraError
from mesh_core.model.checkpoint import CheckpointHeader, ReadingProgress
from mesh_core.model.safetensors import opened, read_into
from mesh_core.model.stored import TensorInfo
from mesh_core.system.file_stamp import FileStamp
from mesh_core.system.forks import hash_threads
from mesh_core.system.remembered import Remembered


class TensorFile:
    """One safetensors file with LoRA tensors, as it was when its header was read.

    Args:
        remember: keep what was computed of it for the next time.

    Attributes:
        stamp: of the file whose header was read.
    """

    def __init__(self, header: CheckpointHeader, *, remember: bool = True) -> None:
        self.header = header
        self.path: Path = header.files[0] if header.tensors else header.path
        self.stamp = header.stamps.get(self.path) or self._look()
        self._digests: dict[str, str] | None = None
        self._lock = threading.Lock()
        self._remember = remember

    def _look(self) -> FileStamp:
        try:
            return FileStamp.at(self.path)
        except OSError as error:
            raise LoraError(f"{self.path} cannot be read: {error.strerror or error}.") from error

    def check_unchanged(self) -> None:
        """Raises:
        LoraError: the file is not the one whose header was read.
        """
        if self._look() != self.stamp:
            raise LoraError(f"{self.path} changed while it was in use.", hint="the same again, once it is written")

    def source(self, name: str) -> TensorOnDisk:
        """The tensor of that name in the file; KeyError if it has none."""
        return TensorOnDisk(self, self.header.tensors[name])

    def digests(self, progress: ReadingProgress | None = None) -> Mapping[str, str]:
        """The digest of every tensor by name, see `Source.digest`. Read once per file and content; then remembered.

        Raises:
            LoraError: the file is not the one whose header was read.
        """
        with self._lock:
            if self._digests is None:
                self.check_unchanged()
                memory = Remembered("loras", {self.path: self.stamp}) if self._remember else None
                found = self._plausible(memory.get()) if memory is not None else None
                if found is not None:
                    self._digests = found
                    return found
                total, done = sum(t.nbytes for t in self.header.tensors.values()), 0
                for name, _ in self.read_through():
                    done += self.header.tensors[name].nbytes
                    if progress is not None:
                        progress(done, total)
                if memory is not None:
                    memory.put(self._digests)
            assert self._digests is not None
            return self._digests

    def _plausible(self, value: Any) -> dict[str, str] | None:
        right = (
            isinstance(value, dict)
            and value.keys() == self.header.tensors.keys()
            and all(isinstance(v, str) and len(v) == 64 for v in value.values())
        )
        return value if right else None

    def read_through(self) -> Iterator[tuple[str, Tensor]]:
        """Name and content of every tensor, in the order of the file; `digests` costs nothing afterwards."""
        found = {}
        for name, _ in sorted(self.header.tensors.items(), key=lambda item: item[1].offset):
            tensor = self.source(name).load()
            found[name] = blake3(bytes_of(tensor), max_threads=hash_threads()).hexdigest()
            yield name, tensor
        self.check_unchanged()
        self._digests = found


class TensorOnDisk:
    """A `Source` in a `TensorFile`."""

    def __init__(self, file: TensorFile, info: TensorInfo) -> None:
        self.file, self.info = file, info
        self.dtype, self.shape, self.nbytes = info.dtype, info.shape, info.nbytes

    def digest(self) -> str:
        return self.file.digests()[self.info.name]

    def load(self) -> Tensor:
        tensor = torch.empty(self.shape, dtype=from_safetensors(self.dtype).torch)
        self._read_into(bytes_of(tensor), 0)
        return tensor

    def read(self, start: int, size: int) -> bytes:
        found = bytearray(size)
        self._read_into(memoryview(found), start)
        return bytes(found)

    def _read_into(self, target: memoryview, start: int) -> None:
        try:
            with opened(self.file.path, self.file.stamp) as stream:
                stream.seek(self.info.offset + start)
                read_into(stream, target, self.file.path)
        except CheckpointError as error:
            raise LoraError(error.message, hint=error.hint) from error
