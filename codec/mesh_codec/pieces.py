"""The symbols of one piece to frames and back: which packing is cheapest, and the table that tells where frames lie.

Must not know tensors, quantiser steps or where a prediction comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import log2

import numpy as np
from numpy.typing import NDArray

from mesh_codec.errors import CodecCorrupt
from mesh_codec.payload import flat_bytes
from mesh_codec.rare_symbols import RareSymbols, read_rare_symbols
from mesh_codec.symbols import PACKINGS, Packing, Symbols, check_frame, entropy_bits, expand, squeeze

_CODER_OVERHEAD_BITS = 0.04
"""Per byte: measured for zstandard's Huffman coder over the entropy of Gaussian symbols."""

_TABLE_BITS = 4
"""Of a Huffman table, per byte value that occurs."""

_SAMPLE = 8192

_FARTHEST = 255
"""Symbols beyond are counted with this one: the reach of a rare symbol is coded in bytes of its own there."""

_PREDICTED = 0x80
"""In the method of a piece: its symbols are changes; the rest of the method is the number of its packing."""

_COLUMNS = 6
"""Numbers of a piece in the table: coded sizes of packed symbols, gaps, low and high bytes; rare symbols; gap bytes."""

TABLE_BYTES = 1 + 4 * _COLUMNS
"""Per piece."""


@dataclass(frozen=True)
class Packed:
    """One piece, coded. ``frames``: packed symbols, gaps, low bytes, high bytes; b"" where nothing is to code."""

    predicted: bool
    packing: int
    frames: tuple[bytes, bytes, bytes, bytes]
    rare: int
    gap_bytes: int


def pack(symbols: Symbols, packing: int, predicted: bool) -> Packed:
    """Code ``symbols`` [n]; overwrites those that are rare."""
    chosen = PACKINGS[packing]
    rare = RareSymbols.beyond(symbols, chosen.radius)
    gaps, low, high = rare.streams()
    symbols[rare.places] = 0
    streams = (chosen.pack(symbols), gaps, low, high if high.any() else high[:0])
    a, b, c, d = (squeeze(s) if len(s) else b"" for s in streams)
    return Packed(predicted, packing, (a, b, c, d), len(low), len(gaps))


def table(pieces: Sequence[Packed]) -> bytes:
    """Methods (uint8 each), then the numbers (uint32, little endian, column by column)."""
    methods = np.array([p.packing | _PREDICTED * p.predicted for p in pieces], dtype=np.uint8)
    numbers = np.array([[*map(len, p.frames), p.rare, p.gap_bytes] for p in pieces], dtype="<u4")
    return methods.tobytes() + np.ascontiguousarray(numbers.T).tobytes()


@dataclass(frozen=True)
class Coded:
    """One piece of ``count`` symbols as it came."""

    predicted: bool
    packing: Packing
    frames: tuple[memoryview, memoryview, memoryview, memoryview]
    rare: int
    gap_bytes: int
    count: int

    def check(self) -> None:
        """Raises:
        CodecCorrupt: sizes that cannot be; nothing was allocated.
        """
        most = self.count if self.packing.radius < PACKINGS[-1].radius else 0
        # Each gap byte but a rare symbol's last stands for 255 symbols.
        if self.rare > most or self.gap_bytes > self.rare + self.count // 255:
            raise CodecCorrupt(f"A payload announces {self.rare} rare symbols in a piece of {self.count}.")
        sizes = (self.packing.size(self.count), self.gap_bytes, self.rare)
        for frame, size in zip(self.frames, (*sizes, self.rare if len(self.frames[3]) else 0), strict=True):
            if size:
                check_frame(frame, size, "symbols")
            elif len(frame):
                raise CodecCorrupt("A payload holds a frame where none belongs.")

    def read(self) -> Symbols:
        """int16 [count].

        Raises:
            CodecCorrupt: damaged.
        """
        packed, gaps, low, high = self.frames
        size = self.packing.size(self.count)
        symbols = self.packing.unpack(expand(packed, size, "symbols") if size else np.empty(0, np.uint8), self.count)
        if self.rare:
            found = read_rare_symbols(
                expand(gaps, self.gap_bytes, "gaps"),
                expand(low, self.rare, "rare symbols"),
                expand(high, self.rare, "rare symbols") if len(high) else None,
                self.packing.radius,
                self.count,
            )
            symbols[found.places] = found.symbols
        return symbols


def read_table(data: memoryview, frames: memoryview, counts: Sequence[int]) -> list[Coded]:
    """The pieces, of ``counts`` symbols each, checked as far as nothing has to be decompressed.

    Raises:
        CodecCorrupt: a method that does not exist, or sizes that do not fit.
    """
    # The size of the table bounds the work for a payload that announces much and holds little.
    flat_bytes(data, TABLE_BYTES * len(counts), "table")
    methods = np.frombuffer(data[: len(counts)], dtype=np.uint8).tolist()
    numbers = np.frombuffer(data[len(counts) :], dtype="<u4").reshape(_COLUMNS, -1).T.tolist()
    last = max(method & ~_PREDICTED for method in methods)
    if last >= len(PACKINGS):
        raise CodecCorrupt(f"A payload uses packing {last}, the last known is {len(PACKINGS) - 1}.")
    ends = list(accumulate(size for row in numbers for size in row[:4]))
    if ends[-1] != frames.nbytes:
        raise CodecCorrupt(f"The pieces of a payload have {frames.nbytes} bytes where {ends[-1]} belong.")
    parts = iter([frames[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)])
    coded = [
        Coded(
            bool(method & _PREDICTED),
            PACKINGS[method & ~_PREDICTED],
            (next(parts), next(parts), next(parts), next(parts)),
            row[4],
            row[5],
            count,
        )
        for method, row, count in zip(methods, numbers, counts, strict=True)
    ]
    for piece in coded:
        piece.check()
    return coded


def cheapest(sample: Symbols, count: int) -> tuple[float, int]:
    """Bits per symbol, about, and the number of the packing that takes the fewest for ``count`` symbols like
    ``sample`` [n], n > 0."""
    extremes = max(-int(sample.min()), int(sample.max()))
    # How often each symbol occurs tells what any packing costs, without packing.
    seen = np.bincount(np.clip(sample, -_FARTHEST, _FARTHEST) + _FARTHEST, minlength=2 * _FARTHEST + 1)
    best = (float("inf"), 0)
    for number, packing in enumerate(PACKINGS):
        bits = _bits(packing, seen, count) if packing.per_byte or not packing.radius else _wide_bits(sample, count)
        best = min(best, (bits, number))
        if packing.radius >= extremes:
            # A wider packing only pays where it leaves fewer rare symbols, and this one leaves none.
            break
    return best


def sample_of(symbols: Symbols) -> Symbols:
    """Some of ``symbols`` [n], spread over them."""
    # An odd stride does not fall in step with image widths.
    return symbols[:: max(1, len(symbols) // _SAMPLE) | 1]


def _bits(packing: Packing, seen: NDArray[np.int64], count: int) -> float:
    """``seen``: how often each symbol from -`_FARTHEST` to `_FARTHEST` occurs in a sample."""
    total, bits = int(seen.sum()), 0.0
    inside = seen[_FARTHEST - packing.radius : _FARTHEST + packing.radius + 1].copy()
    outside = total - int(inside.sum())
    if outside:
        share = outside / total
        beyond = _FARTHEST - packing.radius
        # The reaches below and above: odd and even numbers of one byte.
        reach = np.concatenate([seen[:beyond], seen[-beyond:]])
        gap = max(1.0, -log2(share) - (1 - share) / share * log2(1 - share)) if share < 1 else 1.0
        bits = share * (gap + _stream_bits(_entropy(reach)) + 2 * _CODER_OVERHEAD_BITS)
        bits += _TABLE_BITS * (min(256, 1 + 4 / share) + np.count_nonzero(reach)) / count
    if packing.per_byte:
        inside[packing.radius] += outside
        # Neighbours in a byte are nearly independent: they lie far apart in the piece.
        bits += _stream_bits(packing.per_byte * _entropy(inside)) / packing.per_byte
        bits += _TABLE_BITS * min(256, np.count_nonzero(inside) ** packing.per_byte) / count
    return float(bits)


def _wide_bits(sample: Symbols, count: int) -> float:
    """Of the packing that holds all symbols, in two planes."""
    bits = 0.0
    for plane in np.split(PACKINGS[-1].pack(sample), 2):
        bits += _stream_bits(entropy_bits(plane)) + _TABLE_BITS * np.count_nonzero(np.bincount(plane)) / count
    return float(bits)


def _stream_bits(entropy: float) -> float:
    """Per byte of a stream of such ``entropy``: a byte coder spends at least one bit, but nothing on what is all one
    value."""
    return max(1.0, entropy + _CODER_OVERHEAD_BITS) if entropy else 0.0


def _entropy(counts: NDArray[np.int64]) -> float:
    """Bits per symbol of which so many occur."""
    some = counts[counts > 0]
    total = some.sum()
    return float(np.log2(total) - (some * np.log2(some)).sum() / total) if len(some) > 1 else 0.0
