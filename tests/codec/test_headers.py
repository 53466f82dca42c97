"""The headers of chunks that nvCOMP makes: what a decoder on a GPU may get to see, and what would end it."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from mesh_codec import CodecCorrupt
from mesh_codec.ans.headers import PART, check_headers

MADE_BY_NVCOMP = bytes.fromhex(
    "01000000 00400000 fcfc0b00 01000000 80000000 00080000 00000000 00000000" + "00000100" * 32
)
"""One symbol, 0xfc, coded on an H100 by nvCOMP 6.0.0."""

PARTS_ON_AN_H100 = (7538, 7516, 7566, 7550, 7568, 7536, 7576, 7546)
SIZE_ON_AN_H100 = 60986
"""Of a chunk of 131072 symbols with these parts, from 0 to 255."""


def chunk(symbols, parts, frequencies, smallest=0):
    header = struct.pack("<IIBBBBI", symbols, PART, smallest, smallest + len(frequencies) - 1, 11, 0, 1)
    header += struct.pack(f"<{len(parts)}I", *parts) + struct.pack(f"<{len(frequencies)}h", *frequencies)
    made = header + bytes(-len(header) % 16)
    for part in parts:
        made += bytes(-len(made) % 16) + bytes(part)
    return made


EVEN = [8] * 256
GOOD = (3 * PART, [512, 130, 640], EVEN)


def check(*chunks, symbols=None, places=None):
    frame, at = b"", []
    for coded in chunks:
        at.append(len(frame))
        frame += coded + bytes(-len(coded) % 16)
    symbols = symbols or [int.from_bytes(coded[:4], "little") for coded in chunks]
    check_headers(
        memoryview(frame), np.array(places or at), np.array([len(coded) for coded in chunks]), np.array(symbols)
    )


def test_what_the_library_made_passes():
    check(MADE_BY_NVCOMP)
    whole = chunk(8 * PART, PARTS_ON_AN_H100, EVEN)
    assert len(whole) == SIZE_ON_AN_H100
    check(whole, whole, MADE_BY_NVCOMP)


def test_chunks_of_every_kind_stand_side_by_side():
    rare = [-1, 2040, 3, -1, 3]
    check(
        chunk(*GOOD), chunk(PART + 1, [128, 128], rare, 7), chunk(5, [128], [2048], 255), chunk(5, [128], [1024] * 2, 9)
    )


@pytest.mark.parametrize(
    "frequencies",
    [[7, *EVEN[1:]], [9, *EVEN[1:]], [2049, -1], [-2, 2046], [-2048], [0] * 256, [-1] * 256, [32767, -32768], [2047]],
    ids=str,
)
def test_frequencies_that_do_not_sum_up_are_refused(frequencies):
    with pytest.raises(CodecCorrupt):
        check(chunk(3 * PART, [512, 130, 640], frequencies))


@pytest.mark.parametrize(
    "parts",
    [[496, 146, 640], [512, 126, 644], [512, 0, 640], [513, 130, 640], [1 << 31, 130, 640], [0xFFFFFFF0, 528, 640]],
)
def test_parts_that_do_not_fill_the_chunk_or_hold_no_states_are_refused(parts):
    coded = bytearray(chunk(*GOOD))
    coded[16:28] = struct.pack("<3I", *parts)
    # The first keeps the sum: parts may be of other sizes, as long as they fit.
    if parts[0] == 496:
        coded[16:28] = struct.pack("<3I", 496, 160, 640)
        check(bytes(coded))
        return
    with pytest.raises(CodecCorrupt):
        check(bytes(coded))


@pytest.mark.parametrize(
    ("place", "value"), [(0, 1), (4, 1), (5, 0x20), (8, 1), (9, 0xFE), (10, 12), (11, 1), (12, 2), (15, 1)]
)
def test_any_other_fixed_byte_is_refused(place, value):
    coded = bytearray(chunk(*GOOD))
    coded[place] = value
    with pytest.raises(CodecCorrupt):
        check(bytes(coded), symbols=[3 * PART])


def test_a_largest_symbol_below_the_smallest_is_refused():
    coded = bytearray(MADE_BY_NVCOMP)
    coded[9] = 0xFB
    with pytest.raises(CodecCorrupt):
        check(bytes(coded))


def test_a_chunk_for_other_symbols_or_of_another_size_is_refused():
    coded = chunk(*GOOD)
    for given in (coded[:-2], coded + bytes(2), coded[:16], coded[:30], coded[:48]):
        with pytest.raises(CodecCorrupt):
            check(given, symbols=[3 * PART])
    for symbols in (1, 2 * PART, 3 * PART - 1, 3 * PART + 1, 8 * PART):
        with pytest.raises(CodecCorrupt):
            check(coded, symbols=[symbols])


def test_one_damaged_chunk_among_others_is_found():
    damaged = bytearray(chunk(*GOOD))
    damaged[40] ^= 1
    with pytest.raises(CodecCorrupt):
        check(chunk(*GOOD), bytes(damaged), chunk(*GOOD))
