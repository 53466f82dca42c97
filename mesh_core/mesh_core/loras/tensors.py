"""The tensors of a LoRA, in a file or in memory: their facts, their digest, and the data when it is needed.

A LoRA can be larger than is comfortable to hold, so what lies in a file stays there until it is used.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from blake3 import blake3
from torch import Tensor

from mesh_codec.dtypes import from_safetensors, from_torch
from mesh_codec.payload import bytes_of
from mesh_core.errors import LoraError
from mesh_core.model.checkpoint import CheckpointHeader, ReadingProgress
from mesh_core.model.safetensors import TensorInfo
from mesh_core.model.weights import read_into
from mesh_core.system.remembered import Remembered


class Source(Protocol):
    """A tensor that can be loaded. ``dtype`` is as safetensors names it."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def digest(self) -> str:
        """BLAKE3 of the bytes in row-major order, in hex."""
        ...

    def load(self) -> Tensor:
        """The tensor on the CPU, in its own dtype."""
        ...

    def read(self, start: int, size: int) -> bytes:
        """That part of its bytes in row-major order."""
        ...


class HeldTensor:
    """A tensor in memory. Must not be changed afterwards."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()
        self._digest: str | None = None
        self.dtype = from_torch(tensor.dtype).safetensors
        self.shape = tuple(tensor.shape)
        self.nbytes = tensor.numel() * tensor.element_size()

    def digest(self) -> str:
        if self._digest is None:
            self._digest = blake3(bytes_of(self.load()), max_threads=blake3.AUTO).hexdigest()
        return self._digest

    def load(self) -> Tensor:
        return self._tensor.to("cpu").contiguous()

    def read(self, start: int, size: int) -> bytes:
        return bytes(bytes_of(self.load())[start : start + size])


class TensorFile:
    """One safetensors file with LoRA tensors, as it was when its header was read.

    Args:
        remember: keep what was computed of it for the next time.
    """

    def __init__(self, header: CheckpointHeader, *, remember: bool = True) -> None:
        self.header = header
        self.path: Path = header.files[0] if header.tensors else header.path
        self._stat = self._look()
        self._digests: dict[str, str] | None = None
        self._lock = threading.Lock()
        self._remember = remember

    def _look(self) -> tuple[int, int]:
        try:
            found = self.path.stat()
        except OSError as error:
            raise LoraError(f"{self.path} cannot be read: {error.strerror or error}.") from error
        return found.st_size, found.st_mtime_ns

    def check_unchanged(self) -> None:
        """Raises:
        LoraError: the file is not the one whose header was read.
        """
        if self._look() != self._stat:
            raise LoraError(f"{self.path} changed while it was in use.", hint="the same again, once it is written")

    def source(self, name: str) -> StoredTensor:
        return StoredTensor(self, self.header.tensors[name])

    def digests(self, progress: ReadingProgress | None = None) -> Mapping[str, str]:
        """The digest of every tensor. Read once per file and content; then remembered."""
        with self._lock:
            if self._digests is None:
                self.check_unchanged()
                memory = Remembered("loras", [self.path]) if self._remember else None
                found = self._plausible(memory.get()) if memory is not None else None
                if found is None:
                    found = self._compute(progress)
                    self.check_unchanged()
                    if memory is not None:
                        memory.put(found)
                self._digests = found
            return self._digests

    def _plausible(self, value: Any) -> dict[str, str] | None:
        right = (
            isinstance(value, dict)
            and value.keys() == self.header.tensors.keys()
            and all(isinstance(v, str) and len(v) == 64 for v in value.values())
        )
        return value if right else None

    def _compute(self, progress: ReadingProgress | None) -> dict[str, str]:
        total, done, found = sum(t.nbytes for t in self.header.tensors.values()), 0, {}
        for name, info in sorted(self.header.tensors.items(), key=lambda item: item[1].offset):
            found[name] = blake3(bytes_of(self.source(name).load()), max_threads=blake3.AUTO).hexdigest()
            done += info.nbytes
            if progress is not None:
                progress(done, total)
        return found


class StoredTensor:
    """A tensor of a `TensorFile`."""

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
            with self.file.path.open("rb", buffering=0) as stream:
                stream.seek(self.info.offset + start)
                read_into(stream, target, self.file.path)
        except OSError as error:
            raise LoraError(f"{self.file.path} cannot be read: {error.strerror or error}.") from error
        self.file.check_unchanged()


def check_finite(tensor: Tensor, what: str) -> None:
    """Raises:
    LoraError: ``tensor`` holds a value that is no finite number.
    """
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise LoraError(f"{what} holds values that are not finite (NaN or infinite).", hint="another copy of the file")
