"""How the coded chunks of one tensor lie in a buffer of the formats that a `ByteCoder` is part of.

A table of each chunk's bytes (uint32), then the chunks in their order; the table and every chunk are padded with zeros
to 16 bytes, which is what decoders align to. All chunks stand for `CHUNK` symbols but the last, which has the rest.

Must not know who codes a chunk.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesh_codec.errors import CodecCorrupt
from mesh_codec.payload import flat_bytes

CHUNK = 1 << 17
"""Symbols; each chunk has a table of frequencies of its own."""

ALIGNED = 16


def chunk_count(symbols: int) -> int:
    """How many chunks stand for so many symbols."""
    return -(-symbols // CHUNK)


@lru_cache(maxsize=64)
def plain_chunks(symbols: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Place and size of each chunk's symbols."""
    places = np.arange(0, symbols, CHUNK, dtype=np.int64)
    return places, np.minimum(symbols - places, CHUNK)


Sizes = TypeVar("Sizes", int, NDArray[np.int64])


def padded(sizes: Sizes) -> Sizes:
    """The next multiples of `ALIGNED`."""
    return (sizes + (ALIGNED - 1)) & -ALIGNED


def table_size(count: int) -> int:
    """Bytes before the first chunk."""
    return padded(4 * count)


def frame_size(sizes: NDArray[np.int64]) -> int:
    """Bytes of a buffer with chunks of these ``sizes``."""
    return table_size(len(sizes)) + int(padded(sizes).sum())


def pack(rooms: Tensor, sizes: Tensor, statuses: Tensor, frame: Tensor) -> None:
    """Write the buffer into the uint8 ``frame``, which has room for all; on a GPU, ``frame`` may be page-locked memory.

    ``rooms``: uint8, as much for each chunk. ``sizes``: int64 [chunks]. A chunk whose int32 ``statuses`` is not 0 has
    no bytes, and 0 in the table.
    """
    if rooms.is_cuda:
        from mesh_codec.ans import kernels

        kernels.pack(rooms, sizes, statuses, frame, table_size(len(sizes)))
        return
    coded = torch.where(statuses == 0, sizes, 0).numpy()
    first, room = table_size(len(coded)), len(rooms) // len(coded)
    frame[: frame_size(coded)] = 0
    frame[: 4 * len(coded)] = torch.from_numpy(coded.astype("<u4").view(np.uint8))
    for number, (end, size) in enumerate(zip(np.cumsum(padded(coded)), coded, strict=True)):
        place = first + int(end - padded(size))
        frame[place : place + size] = rooms[number * room : number * room + size]


def read_table(frame: memoryview, symbols: int, room: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places and sizes, in bytes, of the chunks that stand for ``symbols`` in ``frame``.

    Raises:
        CodecCorrupt: the table is missing, has chunks that are empty or larger than ``room``, or ``frame`` is not as
            long as it says.
    """
    count = chunk_count(symbols)
    first = table_size(count)
    if frame.nbytes < first:
        raise CodecCorrupt(f"A payload of {frame.nbytes} bytes has no room for a table of {count} chunks.")
    sizes = np.frombuffer(frame, "<u4", count).astype(np.int64)
    if sizes.min() < 1 or sizes.max() > room:
        raise CodecCorrupt("The table of chunks in a payload is damaged.")
    taken = padded(sizes)
    ends = np.cumsum(taken) + first
    flat_bytes(frame, int(ends[-1]), "symbols")
    return ends - taken, sizes
