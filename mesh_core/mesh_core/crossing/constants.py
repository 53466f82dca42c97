"""Identity of generation constants: the BLAKE3 hash of dtype, shape and whole content.

Tensors that a host passes again and again, unchanged, are hashed once: a tensor object that torch has not modified
since (`Tensor._version`) keeps its hash. Where that says nothing, in inference mode and for a tensor made anew, the
content is compared with copies of what was hashed lately, on the tensor's device.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from blake3 import blake3
from torch import Tensor

from mesh_codec.base import Buffer, Codec, Encoded
from mesh_core.crossing.copies import Copies
from mesh_core.system.forks import hash_threads

_MANY_THREADS = 1 << 20
"""Bytes from which hashing in several threads is faster; for less, waking them takes longer than it saves."""

_MOST_COPIED = 1 << 28
"""Bytes of the copies of one session: several passes with the text of any model, next to nothing beside its blocks."""


def digest(coded: Encoded) -> str:
    """The name of a constant, from its raw encoding."""
    return _digest(coded.header, coded.buffers)


def _digest(header: dict[str, Any], buffers: Sequence[Buffer]) -> str:
    # As JSON has it, without what a JSON encoder costs beside the few bytes of most constants.
    form = f'["{header["dtype"]}", {list(header["shape"])}]'
    large = sum(memoryview(buffer).nbytes for buffer in buffers) >= _MANY_THREADS
    hasher = blake3(form.encode(), max_threads=hash_threads() if large else 1)
    for buffer in buffers:
        hasher.update(buffer)
    return hasher.hexdigest()


class ConstantsBook:
    """Names constants on the host. Holds no tensor of the host's alive, but copies of some. Used from one thread.

    Args:
        raw: the exact codec.
        copied: bytes of copies at most.
    """

    def __init__(self, raw: Codec, copied: int = _MOST_COPIED) -> None:
        self._encoder = raw.encoder({})
        self._known: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}
        self._copies = Copies(copied)

    def names(self, constants: Mapping[str, Tensor]) -> dict[str, tuple[str, Encoded | None]]:
        """Hash of each constant of one step, and its encoding; the encoding is None when the hash was remembered."""
        self._copies.next_step()
        return {name: self.name(tensor) for name, tensor in constants.items()}

    def name(self, tensor: Tensor, *, lasting: bool = True) -> tuple[str, Encoded | None]:
        """Hash of ``tensor`` and its encoding; the encoding is None when the hash was remembered.

        Args:
            lasting: whether the same content may come again in another tensor.
        """
        memo = self._known.get(id(tensor))
        if memo is not None and memo[0]() is tensor and memo[1] == _version(tensor):
            return memo[2], None
        coded: Encoded | None = None
        found = self._copies.find(tensor) if lasting else None
        if found is None:
            coded = self._encoder.encode(tensor)
            found = digest(coded)
            if lasting:
                self._copies.keep(tensor, found)
        version = _version(tensor)
        if version is not None:
            key = id(tensor)
            self._known[key] = (weakref.ref(tensor, lambda _: self._known.pop(key, None)), version, found)
        return found, coded

    def encode(self, tensor: Tensor) -> Encoded:
        """The exact encoding of ``tensor``."""
        return self._encoder.encode(tensor)

    def close(self) -> None:
        """Give the memory of the copies back."""
        self._copies.clear()


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
