"""What an encoder finds out of a tensor on its device, in one piece of memory, so that one copy brings all to the host.

Must not know how any of it is found out, nor the payload's format.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesh_codec.quantiser import bits_of

_FETCHED = 8192
"""Outliers that come with everything else; more cost a copy of their own."""

_SHARE_LISTED = 256
"""One element in so many may lie outside and still be listed."""

_ALIGNED = 16


class DeviceFindings:
    """Attributes, all on the device, 0 at first and after `clear`:
    count: int64 [1], of the elements that no symbol stands for.
    listed: int64 [room], in any order: the place of such an element in its upper half, its bits in the lower. What
        finds no room is counted only.
    total: int64 [1], the `mesh_codec.ans.checksum.checksum` of the symbols.
    step, size: float32 [1]; the common step, and the mean size of the lattice.
    ranks, means, predicted: uint8, bfloat16 and bool [channels]; see `mesh_codec.ans.lattice`.
    """

    def __init__(self, channels: int, elements: int, device: torch.device) -> None:
        room = max(1024, elements // _SHARE_LISTED)
        self._places = _layout(channels, room)
        start, size, _ = self._places[-1]
        self._memory = torch.zeros(start + size, dtype=torch.uint8, device=device)
        parts = _parts(self._memory, self._places)
        self.count, self.total, self.step, self.size, self.ranks, self.means, self.predicted, self.listed = parts
        self._fetched = start + 8 * min(room, _FETCHED)
        self._host = self._memory
        self._there: torch.cuda.Event | None = None
        if self._memory.is_cuda:
            self._host = torch.empty(self._fetched, dtype=torch.uint8, pin_memory=True)
            self._there = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        """Set everything to 0, for the next tensor of the same size."""
        self._memory.zero_()

    def fetch(self) -> None:
        """Start the copy; what is written later is not in it."""
        if self._there is not None:
            self._host.copy_(self._memory[: self._fetched], non_blocking=True)
            self._there.record(torch.cuda.current_stream(self._memory.device))

    def read(self) -> Findings:
        """What was fetched; waits until it is there."""
        if self._there is not None:
            self._there.synchronize()
        host = self._host.numpy()[: self._fetched]
        count, total, step, size, ranks, means, predicted, listed = (
            host[start : start + size] for start, size, _ in self._places
        )
        number, entries = int(count.view(np.int64)[0]), listed.view(np.int64)
        if number > len(entries) and number <= len(self.listed):
            entries = self.listed[:number].cpu().numpy()
        return Findings(
            int(total.view(np.int64)[0]),
            float(step.view(np.float32)[0]),
            float(size.view(np.float32)[0]),
            torch.from_numpy(ranks),
            torch.from_numpy(means).view(torch.bfloat16),
            predicted,
            entries[:number] if number <= len(entries) else None,
        )


def in_one_copy(ranks: Tensor, means: Tensor, step: float, device: torch.device) -> list[Tensor]:
    """On ``device``, brought in one copy: float32 [1] step, ``ranks``, ``means``, and bool [channels], all False."""
    places = _layout(len(ranks), 0)
    host = np.zeros(places[-1][0], np.uint8)
    for place, value in ((2, np.float32(step)), (4, ranks.numpy()), (5, bits_of(means))):
        start, size, _ = places[place]
        host[start : start + size].view(value.dtype)[:] = value
    there = torch.from_numpy(host).to(device, non_blocking=True)
    return _parts(there, [places[2], *places[4:7]])


def _parts(memory: Tensor, places: list[tuple[int, int, torch.dtype]]) -> list[Tensor]:
    return [memory[start : start + size].view(dtype) for start, size, dtype in places]


@lru_cache(maxsize=256)
def _layout(channels: int, room: int) -> list[tuple[int, int, torch.dtype]]:
    """Where each of the attributes of `DeviceFindings` begins, its bytes and its type."""
    places, start = [], 0
    for dtype, count in (
        (torch.int64, 1), (torch.int64, 1), (torch.float32, 1), (torch.float32, 1), (torch.uint8, channels),
        (torch.bfloat16, channels), (torch.bool, channels), (torch.int64, room),
    ):  # fmt: skip
        size = dtype.itemsize * count
        places.append((start, size, dtype))
        start += -(-size // _ALIGNED) * _ALIGNED
    return places


@dataclass(frozen=True)
class Findings:
    """`DeviceFindings` on the host, valid until they are next cleared or fetched; ``listed`` is None where there was no
    room for all."""

    total: int
    step: float
    size: float
    ranks: Tensor
    means: Tensor
    predicted: NDArray[np.uint8]
    listed: NDArray[np.int64] | None
