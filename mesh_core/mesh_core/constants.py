"""Identity of generation constants: the BLAKE3 hash of dtype, shape and whole content.

Tensors that a host passes again and again, unchanged, are hashed once: a tensor object that torch has not modified
since (`Tensor._version`) keeps its hash.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from blake3 import blake3
from torch import Tensor

from mesh_codec.base import Buffer, Codec, Encoded

_MANY_THREADS = 1 << 20
"""Bytes from which hashing in several threads is faster; for less, waking them takes longer than it saves."""


def digest(coded: Encoded) -> str:
    """The name of a constant, from its raw encoding."""
    return _digest(coded.header, coded.buffers)


def _digest(header: dict[str, Any], buffers: Sequence[Buffer]) -> str:
    # As JSON has it, without what a JSON encoder costs beside the few bytes of most constants.
    form = f'["{header["dtype"]}", {list(header["shape"])}]'
    large = sum(memoryview(buffer).nbytes for buffer in buffers) >= _MANY_THREADS
    hasher = blake3(form.encode(), max_threads=blake3.AUTO if large else 1)
    for buffer in buffers:
        hasher.update(buffer)
    return hasher.hexdigest()


class ConstantsBook:
    """Names constants on the host. Holds no tensors alive. Used from one thread.

    Args:
        raw: the exact codec.
    """

    def __init__(self, raw: Codec) -> None:
        self._encoder = raw.encoder({})
        self._known: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}

    def name(self, tensor: Tensor) -> tuple[str, Encoded | None]:
        """Hash of ``tensor`` and its encoding; the encoding is None when the hash was remembered."""
        memo = self._known.get(id(tensor))
        if memo is not None and memo[0]() is tensor and memo[1] == _version(tensor):
            return memo[2], None
        coded = self._encoder.encode(tensor)
        name = digest(coded)
        version = _version(tensor)
        if version is not None:
            key = id(tensor)
            self._known[key] = (weakref.ref(tensor, lambda _: self._known.pop(key, None)), version, name)
        return name, coded

    def encode(self, tensor: Tensor) -> Encoded:
        """The exact encoding of ``tensor``."""
        return self._encoder.encode(tensor)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
