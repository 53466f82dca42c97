"""Constants of generations on the device that computes, shared by the sessions that name the same ones."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mesh_codec.base import Decoder, Encoded
from mesh_core.crossing.constants import digest
from mesh_core.crossing.streams import aligned
from mesh_core.errors import ConstantsMissing, WireMalformed, WireTooLarge


class ConstantsCache:
    """Tensors by the hash of their content, on one device, least recently used first out. Thread-safe.

    Args:
        limit: bytes kept.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self._device, self._limit = device, limit
        self._held: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes kept now."""
        with self._lock:
            return sum(t.nbytes for t in self._held.values())

    def take(self, entries: Sequence[Mapping[str, Any]], buffers: list[memoryview], decoder: Decoder) -> None:
        """Keep constants that arrived.

        Args:
            entries: per constant ``h``: header of the codec, ``k``: number of its ``buffers``, ``hash``: its name.

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
            self.put(entry["hash"], aligned(tensor))

    def put(self, digest: str, tensor: Tensor) -> None:
        """Keep ``tensor`` (already on the device).

        Raises:
            WireTooLarge: it alone is over the limit.
        """
        if tensor.nbytes > self._limit:
            raise WireTooLarge(
                f"A constant of {tensor.nbytes / 1e6:.0f} MB is over the worker's cache of {self._limit / 1e6:.0f} MB.",
                hint="a larger [worker] constants_cache in the worker's config.toml",
            )
        with self._lock:
            self._held[digest] = tensor
            self._held.move_to_end(digest)
            while sum(t.nbytes for t in self._held.values()) > self._limit:
                self._held.popitem(last=False)

    def get(self, wanted: Mapping[str, str]) -> dict[str, Tensor]:
        """The tensors for ``name -> hash``.

        Raises:
            ConstantsMissing: some are not here (any more); the host sends them again.
        """
        with self._lock:
            missing = sorted(name for name, digest in wanted.items() if digest not in self._held)
            if missing:
                raise ConstantsMissing(
                    f"Constants not here: {', '.join(missing)}.",
                    hint="if sending them again does not help, a larger [worker] constants_cache in its config.toml",
                )
            for digest in wanted.values():
                self._held.move_to_end(digest)
            return {name: self._held[digest] for name, digest in wanted.items()}
