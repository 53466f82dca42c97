"""Constants of generations on the device that computes, shared by the sessions that name the same ones."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mesh_codec.base import Decoder, Encoded
from mesh_core.crossing.constants import digest
from mesh_core.crossing.streams import aligned
from mesh_core.errors import ConstantsMissing, WireMalformed, WireTooLarge

_OVERHEAD = 4096
"""Bytes that a constant counts beside its content: the objects around it, so that small ones are limited in number."""


class ConstantsCache:
    """Tensors by the hash of their content, on one device. Thread-safe.

    When it is full, the member that has most in it gives way, of its constants the least recently used one first.

    Args:
        limit: bytes kept.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self._device, self._limit = device, limit
        self._held: dict[str, OrderedDict[str, Tensor]] = {}
        self._owners: dict[str, str] = {}
        self._used: Counter[str] = Counter()
        self._total = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes kept now, what each constant counts beside its content included."""
        return self._total

    def take(
        self, entries: Sequence[Mapping[str, Any]], buffers: list[memoryview], decoder: Decoder, owner: str = ""
    ) -> None:
        """Keep constants that arrived.

        Args:
            entries: per constant ``h``: header of the codec, ``k``: number of its ``buffers``, ``hash``: its name.
            owner: the member that sent them.

        Raises:
            WireMalformed: a constant does not have the hash that it came with; those before it are kept.
            WireTooLarge: see `put`.
        """
        position = 0
        for entry in entries:
            coded = Encoded(entry["h"], buffers[position : position + entry["k"]])
            position += entry["k"]
            tensor = decoder.decode(coded, self._device)
            if digest(coded) != entry["hash"]:
                raise WireMalformed("A constant does not have the hash that it came with.")
            # On the CPU the tensor is a view of the network buffer, which lives as long as the cache entry.
            self.put(entry["hash"], aligned(tensor), owner)

    def put(self, digest: str, tensor: Tensor, owner: str = "") -> None:
        """Keep ``tensor`` (already on the device) for ``owner``, unless it is here.

        Raises:
            WireTooLarge: it alone is over the limit.
        """
        if _cost(tensor) > self._limit:
            raise WireTooLarge(
                f"A constant of {tensor.nbytes / 1e6:.0f} MB is over the worker's cache of {self._limit / 1e6:.0f} MB.",
                hint="a larger [worker] constants_cache in the worker's config.toml",
            )
        with self._lock:
            if digest in self._owners:
                self._touch(digest)
                return
            self._held.setdefault(owner, OrderedDict())[digest] = tensor
            self._owners[digest] = owner
            self._count(owner, _cost(tensor))
            while self._total > self._limit:
                self._evict(max(self._used, key=lambda o: self._used[o]))

    def get(self, wanted: Mapping[str, str]) -> dict[str, Tensor]:
        """The tensors for ``name -> hash``.

        Raises:
            ConstantsMissing: some are not here (any more); the host sends them again.
        """
        with self._lock:
            missing = sorted(name for name, digest in wanted.items() if digest not in self._owners)
            if missing:
                raise ConstantsMissing(
                    f"Constants not here: {', '.join(missing)}.",
                    hint="if sending them again does not help, a larger [worker] constants_cache in its config.toml",
                )
            return {name: self._touch(digest) for name, digest in wanted.items()}

    def _touch(self, digest: str) -> Tensor:
        theirs = self._held[self._owners[digest]]
        theirs.move_to_end(digest)
        return theirs[digest]

    def _evict(self, owner: str) -> None:
        digest, tensor = self._held[owner].popitem(last=False)
        del self._owners[digest]
        self._count(owner, -_cost(tensor))

    def _count(self, owner: str, nbytes: int) -> None:
        self._total += nbytes
        self._used[owner] += nbytes
        if not self._used[owner]:
            del self._used[owner], self._held[owner]


def _cost(tensor: Tensor) -> int:
    return tensor.nbytes + _OVERHEAD
