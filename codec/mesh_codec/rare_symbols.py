"""The few symbols of a piece that its packing cannot hold: gaps between them and how far they reach, in bytes.

Where nearly all symbols are 0 this alone is the coder: a gap costs what its entropy is, where packed symbols cost a
fifth of a bit each at least. Must not know packings or tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mesh_codec.errors import CodecCorrupt
from mesh_codec.symbols import RADIUS, Symbols

_ON = 255
"""A gap byte that says: so many more, and go on."""


@dataclass(frozen=True)
class RareSymbols:
    """``places`` (int64, ascending) in the piece, and the ``symbols`` there, all beyond ``radius``."""

    places: NDArray[np.int64]
    symbols: Symbols
    radius: int

    @classmethod
    def beyond(cls, symbols: Symbols, radius: int) -> RareSymbols:
        """Those of ``symbols`` [n]."""
        if radius >= RADIUS:
            return cls(np.empty(0, np.int64), symbols[:0], radius)
        # One comparison: as unsigned numbers, what is below -radius is large.
        shifted = symbols.view(np.uint16) + np.uint16(radius)
        places = np.flatnonzero(shifted > 2 * radius)
        return cls(places, symbols[places], radius)

    def streams(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
        """Gap bytes; low and high bytes of the reach, ``2 * (|symbol| - radius - 1)``, odd for negative symbols."""
        gaps = np.diff(self.places, prepend=-1) - 1
        ends = np.cumsum(gaps // _ON + 1) - 1
        gap_bytes = np.full(ends[-1] + 1 if len(ends) else 0, _ON, dtype=np.uint8)
        gap_bytes[ends] = gaps % _ON
        reach = reaches(self.symbols, self.radius)
        return gap_bytes, reach.astype(np.uint8), (reach >> 8).astype(np.uint8)


def reaches(symbols: Symbols, radius: int) -> NDArray[np.uint16]:
    """How far ``symbols`` lie beyond ``radius``, and on which side."""
    wide = symbols.astype(np.int32)
    return ((np.abs(wide) - radius - 1) * 2 + (wide < 0)).astype(np.uint16)


def read_rare_symbols(
    gaps: NDArray[np.uint8], low: NDArray[np.uint8], high: NDArray[np.uint8] | None, radius: int, count: int
) -> RareSymbols:
    """The inverse of `RareSymbols.streams`, of a piece of ``count`` symbols; without high bytes they are 0.

    Raises:
        CodecCorrupt: not as many gaps as reaches, places outside the piece, or symbols out of range.
    """
    ends = np.flatnonzero(gaps != _ON)
    if len(ends) != len(low) or (len(gaps) and gaps[-1] == _ON):
        raise CodecCorrupt(f"A payload has {len(ends)} gaps for {len(low)} rare symbols.")
    places = np.cumsum(gaps, dtype=np.int64)[ends] + np.arange(len(ends))
    if len(places) and places[-1] >= count:
        raise CodecCorrupt("The rare symbols of a payload lie outside their piece.")
    reach = low.astype(np.int32)
    if high is not None:
        reach |= high.astype(np.int32) << 8
    size = (reach >> 1) + radius + 1
    if len(size) and size.max() > RADIUS:
        raise CodecCorrupt("The rare symbols of a payload are out of range.")
    return RareSymbols(places, np.where(reach & 1, -size, size).astype(np.int16), radius)
