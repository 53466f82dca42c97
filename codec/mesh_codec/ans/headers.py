"""What nvCOMP 6's decoder takes on trust in a coded chunk, checked before it gets to see it. Must not know tensors.

The library looks at sizes, but not at a chunk's table of frequencies nor at the sizes of its parts: with others than an
encoder's it reads and writes where nothing is, which ends CUDA for the whole process (seen on an H100, 6.0.0). Whatever
bytes follow a header that passes here decode to something, without harm.

Layout, as seen in what the library makes with the options of `mesh_codec.ans.libnvcomp`: little-endian uint32 the
symbols and `PART`; bytes: the smallest symbol, the largest, `_BITS`, 0; uint32 1; the bytes of each part, uint32; how
often each symbol occurs from the smallest to the largest, int16: of 2**`_BITS`, and -1 for what occurs less than once
of them, which counts as once. What follows begins at a multiple of 16, and so does each part.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mesh_codec.ans.chunks import ALIGNED, padded
from mesh_codec.errors import CodecCorrupt

PART = 1 << 14
"""Symbols of a part: the share of a warp."""

_BITS = 11
_STATES = 4 * 32
"""Bytes at the end of a part, of which the rest is words of two."""

_ROW = ALIGNED
_Numbers = NDArray[np.int64]


def check_headers(frame: memoryview, places: _Numbers, sizes: _Numbers, symbols: _Numbers) -> None:
    """``places``, multiples of 16, and ``sizes`` are those of the chunks in ``frame``, ``symbols`` what they stand for.

    Raises:
        CodecCorrupt: a chunk that no encoder made.
    """
    if sizes.min() < 2 * _ROW:
        raise CodecCorrupt("A chunk of symbols in a payload is too short for its header.")
    rows, firsts = np.frombuffer(frame, f"V{_ROW}", frame.nbytes // _ROW), places // _ROW
    parts, span = -(-symbols // PART), rows[firsts].view("<u2").reshape(-1, _ROW // 2)[:, 4]
    # Chunks of like layout are checked together. Nearly always that is all of them, or all but the last.
    kinds = (parts << 16 | span).astype(np.int64)
    found = set(kinds.tolist())
    for kind in found:
        of_kind = kinds == kind if len(found) > 1 else slice(None)
        if not _fit(rows, firsts[of_kind], sizes[of_kind], symbols[of_kind], kind >> 16, kind & 0xFFFF):
            raise CodecCorrupt("A chunk of symbols in a payload is damaged: its header does not fit.")


def _fit(rows: NDArray[np.void], firsts: _Numbers, sizes: _Numbers, symbols: _Numbers, parts: int, span: int) -> bool:
    table, entries = 4 + parts, (span >> 8) - (span & 0xFF) + 1
    length = -(-(4 * table + 2 * entries) // _ROW)
    if entries < 1 or sizes.min() < length * _ROW:
        return False
    words = rows[firsts[:, None] + np.arange(length)].view("<u4").reshape(len(firsts), -1)
    taken = words[:, 4:table].astype(np.int64)
    before_last = padded(taken[:, :-1])
    frequencies = words.view("<i2")[:, 2 * table : 2 * table + entries]
    return bool(
        (words[:, 0] == symbols).all()
        and (words[:, 1:4] == (PART, _BITS << 16 | span, 1)).all()
        and taken.min() >= _STATES
        and not (np.bitwise_or.reduce(taken, axis=None) & 1)
        and (before_last.sum(1) + taken[:, -1] + length * _ROW == sizes).all()
        and frequencies.min() >= -1
        # Of at most 256 entries that may be as large as 2**15, int32 holds the sum.
        and (np.abs(frequencies).sum(1, dtype=np.int32) == 1 << _BITS).all()
    )
