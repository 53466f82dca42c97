"""Quantiser symbols to bytes that an order-0 byte coder does well on, and back; and that byte coder, zstandard.

A byte coder spends at least one bit per byte, so small symbols share a byte: ``per_byte`` digits of base
``2 * radius + 1``. Wide symbols are split into a plane of high and a plane of low bytes. Must not know tensors or
where symbols come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import local

import numpy as np
import zstandard
from numpy.typing import NDArray

from mesh_codec.errors import CodecCorrupt

Symbols = NDArray[np.int16]

RADIUS = 32767
"""Largest symbol, and minus the smallest."""

# Order-0 coding of noise: any match that is found is found by chance, and coding one costs more than it saves. A tiny
# hash table and the longest minimal match keep the match finder out of the way, but for long runs.
_LITERALS = zstandard.ZstdCompressionParameters(
    window_log=18,
    hash_log=6,
    chain_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
    strategy=zstandard.STRATEGY_FAST,
    write_checksum=True,
)


@dataclass(frozen=True)
class Packing:
    """How symbols from ``-radius`` to ``radius`` lie in bytes: ``per_byte`` in each, or 0 for two planes.

    With radius 0 they lie nowhere: all are 0.
    """

    radius: int
    per_byte: int

    @property
    def base(self) -> int:
        """How many symbols there are, from ``-radius`` to ``radius``."""
        return 2 * self.radius + 1

    def size(self, count: int) -> int:
        """Bytes that ``count`` symbols take."""
        if not self.radius:
            return 0
        return -(-count // self.per_byte) if self.per_byte else 2 * count

    def pack(self, symbols: Symbols) -> NDArray[np.uint8]:
        """``symbols`` [n] within the radius -> uint8 [`size` (n)]."""
        if not self.radius:
            return np.empty(0, dtype=np.uint8)
        if not self.per_byte:
            return np.concatenate([(symbols >> 8).astype(np.uint8), symbols.astype(np.uint8)])
        if self.per_byte == 1:
            return symbols.astype(np.int8).view(np.uint8)
        digits = np.zeros((self.per_byte, self.size(len(symbols))), dtype=np.uint8)
        np.add(symbols, self.radius, out=digits.reshape(-1)[: len(symbols)], casting="unsafe")
        packed: NDArray[np.uint8] = digits[0].copy()
        for digit in digits[1:]:
            packed *= np.uint8(self.base)
            packed += digit
        return packed

    def unpack(self, packed: NDArray[np.uint8], count: int) -> Symbols:
        """The inverse of `pack`: int16 [count].

        Raises:
            CodecCorrupt: a byte that packs no symbols.
        """
        if not self.radius:
            return np.zeros(count, dtype=np.int16)
        if not self.per_byte:
            return packed[:count].view(np.int8).astype(np.int16) << 8 | packed[count:]
        if self.per_byte == 1:
            return packed.view(np.int8).astype(np.int16)
        if packed.max() >= self.base**self.per_byte:
            raise CodecCorrupt("A payload's packed symbols hold a byte out of range.")
        values = np.arange(256)
        symbols = np.empty((self.per_byte, len(packed)), dtype=np.int16)
        for place, row in enumerate(symbols):
            digit = values // self.base ** (self.per_byte - 1 - place) % self.base
            np.take((digit - self.radius).astype(np.int16), packed, out=row, mode="clip")
        return symbols.reshape(-1)[:count]


PACKINGS: tuple[Packing, ...] = (
    Packing(0, 0),
    Packing(1, 5),
    Packing(2, 3),
    Packing(7, 2),
    Packing(127, 1),
    Packing(RADIUS, 0),
)
"""By number in the bitstream."""


class _OfThread(local):
    """A context is for one thread at a time, and takes as long to make as to use on a small frame."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_LITERALS)
        self.decompressor = zstandard.ZstdDecompressor()


_of_thread = _OfThread()


def entropy_bits(data: NDArray[np.uint8]) -> float:
    """Order-0 entropy of ``data`` in bits per byte."""
    counts = np.bincount(data)
    p = counts[counts > 0] / len(data)
    return float(-(p * np.log2(p)).sum())


def squeeze(data: NDArray[np.uint8]) -> bytes:
    """``data`` as one zstandard frame with its size and a checksum."""
    return _of_thread.compressor.compress(data.data)


def check_frame(frame: memoryview, size: int, what: str) -> None:
    """Raises:
    CodecCorrupt: ``frame`` does not announce a content of ``size`` bytes.
    """
    try:
        announced = zstandard.get_frame_parameters(frame).content_size
    except zstandard.ZstdError as error:
        raise CodecCorrupt(f"The {what} of a payload are damaged: {error}.") from error
    if announced != size:
        raise CodecCorrupt(f"The {what} of a payload announce {announced} bytes where {size} belong.")


def expand(frame: memoryview, size: int, what: str) -> NDArray[np.uint8]:
    """The inverse of `squeeze`: uint8 [size]. The announced size is checked before anything is allocated.

    Raises:
        CodecCorrupt: no frame, damaged, of another size, or with something after it.
    """
    check_frame(frame, size, what)
    try:
        data = _of_thread.decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecCorrupt(f"The {what} of a payload are damaged: {error}.") from error
    if len(data) != size:
        raise CodecCorrupt(f"The {what} of a payload hold {len(data)} bytes where {size} belong.")
    return np.frombuffer(data, dtype=np.uint8)
