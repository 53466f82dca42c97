"""The tensors of a LoRA, wherever they are: their facts, their digest, and the data when it is needed."""

from __future__ import annotations

from typing import Protocol

import torch
from blake3 import blake3
from torch import Tensor

from mesh_codec.dtypes import from_torch
from mesh_codec.memory import bytes_of
from mesh_core.errors import LoraError
from mesh_core.system.forks import hash_threads


class Source(Protocol):
    """A tensor that can be loaded. What is in a file raises LoraError when the file changed or is gone."""

    @property
    def dtype(self) -> str:
        """As safetensors names it (``"BF16"``)."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Known without loading."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the data; known without loading."""
        ...

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
    """A `Source` in memory. The tensor must not be changed afterwards."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()
        self._digest: str | None = None
        self.dtype = from_torch(tensor.dtype).safetensors
        self.shape = tuple(tensor.shape)
        self.nbytes = tensor.numel() * tensor.element_size()

    def digest(self) -> str:
        if self._digest is None:
            self._digest = blake3(bytes_of(self.load()), max_threads=hash_threads()).hexdigest()
        return self._digest

    def load(self) -> Tensor:
        return self._tensor.to("cpu").contiguous()

    def read(self, start: int, size: int) -> bytes:
        return bytes(bytes_of(self.load())[start : start + size])


def check_finite(tensor: Tensor, what: str) -> None:
    """Raises:
    LoraError: ``tensor`` holds a value that is no finite number.
    """
    if tensor.is_floating_point() and tensor.itemsize == 1:
        tensor = tensor.to(torch.float16)  # of the types of 8 bits, torch does not know it, and this holds all values
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise LoraError(f"{what} holds values that are not finite (NaN or infinite).", hint="another copy of the file")
