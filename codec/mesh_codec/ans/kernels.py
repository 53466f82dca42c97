"""`Lattice.quantise`, `Lattice.restore`, `checksum` and `pack` as Triton kernels: one read and write of each array.

A program takes a tile of tokens and channels, reads it along channels and writes it along tokens: both are contiguous,
the transposition happens inside, while elements are small. Same arithmetic as in `mesh_codec.ans.lattice`. Triton looks
annotations up as it compiles, so functions that it compiles are annotated with its own types only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mesh_codec.ans.findings import DeviceFindings
from mesh_codec.ans.lattice import Lattice
from mesh_codec.ans.launch import aligned, launch
from mesh_codec.channels import widest_rank
from mesh_codec.exact import as_integers

_TOKENS, _CHANNELS = 32, 64
_ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2**23: added to a float32 of at most 2**22 and taken off again, it rounds to nearest, ties to even."""

Tables = tuple[Tensor, Tensor, Tensor, Tensor]

_SUMMED, _WRITTEN = 4096, 512
RANKED, AMONG = 32, 512
"""Channels that a program finds the places of, and among how many at a time."""

_PACKERS, _PACKED, _ADDED = 8, 1024, 128
"""Programs that share a chunk, the words of 8 bytes that one moves at a time, and the sizes that it adds at a time."""


def quantise(lattice: Lattice, tokens: Tensor, state: Tensor | None, findings: DeviceFindings, period: int) -> Tensor:
    """`Lattice.quantise`; ``period`` is that of the checksum's weights."""
    rows, columns = tokens.shape
    symbols = torch.empty(columns, rows, dtype=torch.int8, device=tokens.device)
    held = state is not None
    launch(
        _quantise, _tiles(rows, columns), (rows, columns, tokens.dtype, held, aligned(tokens)),
        tokens, as_integers(tokens), state if held else symbols, symbols,
        lattice.place, lattice.means, lattice.inverse, lattice.scales, findings.predicted, findings.listed,
        findings.count, findings.total, len(findings.listed), rows, columns, held, period, _TOKENS, _CHANNELS,
    )  # fmt: skip
    return symbols


def tables(ranks: Tensor, means: Tensor, step: Tensor, radius: int) -> Tables:
    """The tensors of `Lattice.of`."""
    channels = len(ranks)
    place, floats, found = new_tables(channels, ranks.device)
    launch(
        _tables, (triton.cdiv(channels, RANKED), 1), (channels, radius, aligned(ranks, means, step)),
        ranks, means, step, place, floats, channels, widest_rank(radius), RANKED, AMONG,
    )  # fmt: skip
    return found


def new_tables(channels: int, device: torch.device) -> tuple[Tensor, Tensor, Tables]:
    """What `tabulate` writes into: int64 [channels] and float32 [3, channels]; and both as `Lattice` has them."""
    place = torch.empty(channels, dtype=torch.int64, device=device)
    floats = torch.empty(3, channels, dtype=torch.float32, device=device)
    means, scales, inverse = floats.unbind()
    return place, floats, (place, means, scales, inverse)


def checksum(data: Tensor, total: Tensor, period: int) -> None:
    """Add `mesh_codec.ans.checksum.checksum` of flat uint8 ``data`` to ``total``, int64 [1]."""
    size = data.numel()
    key = (size, period, aligned(data, total))
    launch(_checksum, (triton.cdiv(size, _SUMMED), 1), key, data, total, size, period, _SUMMED)


def write_listed(values: Tensor, listed: Tensor) -> None:
    """`mesh_codec.exact.write_listed`, in place; ``listed`` is not empty."""
    count = len(listed)
    launch(
        _write_listed, (triton.cdiv(count, _WRITTEN), 1), (count, values.dtype, aligned(listed)),
        as_integers(values), listed, count, _WRITTEN,
    )  # fmt: skip


def pack(rooms: Tensor, sizes: Tensor, statuses: Tensor, frame: Tensor, first: int) -> None:
    """`mesh_codec.ans.chunks.pack`; ``first`` is the byte of ``frame`` at which chunks begin."""
    count = len(sizes)
    launch(
        _pack, (count, _PACKERS), (count, len(rooms), aligned(sizes, statuses)),
        rooms.view(torch.int64), sizes, statuses, frame.view(torch.int64), frame.view(torch.int32),
        len(rooms) // count // 8, first // 8, first // 4, count, _PACKERS, _PACKED, _ADDED,
    )  # fmt: skip


def restore(lattice: Lattice, symbols: Tensor, state: Tensor, predicted: Tensor, dtype: torch.dtype) -> Tensor:
    """`Lattice.restore`."""
    columns, rows = symbols.shape
    tokens = torch.empty(rows, columns, dtype=dtype, device=symbols.device)
    launch(
        _restore, _tiles(rows, columns), (rows, columns, dtype, aligned(symbols, predicted)),
        symbols, state, tokens, lattice.place, lattice.means, lattice.scales, predicted, torch.finfo(dtype).max,
        rows, columns, _TOKENS, _CHANNELS,
    )  # fmt: skip
    return tokens


def _tiles(rows: int, columns: int) -> tuple[int, int]:
    return triton.cdiv(rows, _TOKENS), triton.cdiv(columns, _CHANNELS)


@triton.jit  # type: ignore[untyped-decorator]
def _quantise(  # type: ignore[no-untyped-def]
    tokens, bits, state, symbols, place, means, inverse, scales, predicted, listed, count, total, room, rows, columns,
    HELD: tl.constexpr, PERIOD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    # Indices are those of at most 2**31 elements.
    value = tl.load(tokens + row[:, None] * columns + column[None, :], there, other=0.0)
    # What is written decides which way the tile is best held: with a state channels are rows, by measurement.
    if HELD:
        value = tl.trans(value)
        row, column = row[None, :], column[:, None]
    else:
        row, column = row[:, None], column[None, :]
    value = value.to(tl.float32)
    there, known = (row < rows) & (column < columns), column < columns
    mean = tl.load(means + column, known, other=0.0)
    scale = tl.load(scales + column, known, other=0.0)
    offset = (value - mean) * tl.load(inverse + column, known, other=0.0)
    offset = tl.where((scale == 0) & (value == mean), 0.0, offset)
    inside = tl.abs(offset) < 32767.5
    whole = tl.where(inside, offset, 0.0)
    whole = ((whole + _ROUNDER) - _ROUNDER).to(tl.int32)
    target = tl.load(place + column, known, other=0).to(tl.int32) * rows + row
    symbol = whole
    if HELD:
        follows = tl.load(predicted + column, known, other=0) != 0
        base = tl.load(state + target, there & follows, other=0).to(tl.int32)
        symbol = whole - base
    inside = inside & (tl.abs(symbol) <= 127)
    symbol = tl.where(inside, symbol, 0)
    tl.store(symbols + target, symbol.to(tl.int8), there)
    if HELD:
        tl.store(state + target, (base + symbol).to(tl.int16), there)
    outside = there & (inside == 0)
    found = outside.to(tl.int32)
    by_line = tl.sum(found, 1)
    number = tl.sum(by_line, 0)
    # Tiles that have any are few. One sum on the counter for all of a tile: a token may lie outside as a whole.
    if number > 0:
        first = tl.atomic_add(count, number.to(tl.int64))
        entry = first + (tl.cumsum(by_line, 0) - by_line)[:, None] + tl.cumsum(found, 1) - 1
        source = row * columns + column
        own = tl.load(bits + source, outside, other=0).to(tl.int64) & 0xFFFFFFFF
        tl.store(listed + entry, (source.to(tl.int64) << 32) | own, outside & (entry < room))
    byte = tl.where(there, symbol & 0xFF, 0)
    # A product has 24 bits, so that the sum of a line of up to 128 has at most 31.
    weighted = byte * (target % PERIOD + 1)
    tl.atomic_add(total, tl.sum(tl.sum(weighted, 1).to(tl.int64), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _restore(  # type: ignore[no-untyped-def]
    symbols, state, tokens, place, means, scales, predicted, largest, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = (column < columns)[:, None]
    there = known & (row < rows)[None, :]
    source = (tl.load(place + column, column < columns, other=0).to(tl.int32) * rows)[:, None] + row[None, :]
    follows = (tl.load(predicted + column, column < columns, other=0) != 0)[:, None]
    base = tl.load(state + source, there & follows, other=0).to(tl.int32)
    whole = (base + tl.load(symbols + source, there, other=0).to(tl.int32)).to(tl.int16)
    tl.store(state + source, whole, there)
    value = whole.to(tl.float32) * tl.load(scales + column, column < columns, other=0.0)[:, None]
    value = value + tl.load(means + column, column < columns, other=0.0)[:, None]
    value = tl.minimum(tl.maximum(value, -largest), largest).to(tokens.dtype.element_ty)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(tokens + row[:, None] * columns + column[None, :], tl.trans(value), there)


@triton.jit  # type: ignore[untyped-decorator]
def _checksum(data, total, size, PERIOD: tl.constexpr, SUMMED: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.program_id(0).to(tl.int64) * SUMMED
    number = tl.arange(0, SUMMED)
    byte = tl.load(data + first + number, first + number < size, other=0).to(tl.int64)
    weight = ((first % PERIOD).to(tl.int32) + number) % PERIOD + 1
    tl.atomic_add(total, tl.sum(byte * weight, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _write_listed(elements, listed, count, WRITTEN: tl.constexpr):  # type: ignore[no-untyped-def]
    number = tl.program_id(0) * WRITTEN + tl.arange(0, WRITTEN)
    entry = tl.load(listed + number, number < count, other=0)
    tl.store(elements + (entry >> 32), entry.to(elements.dtype.element_ty), number < count)


@triton.jit  # type: ignore[untyped-decorator]
def _pack(  # type: ignore[no-untyped-def]
    rooms, sizes, statuses, words, table, room, first, entries, count,
    PACKERS: tl.constexpr, PACKED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    chunk, packer = tl.program_id(0), tl.program_id(1)
    before = tl.zeros((ADDED,), tl.int64)
    for start in range(0, chunk, ADDED):
        other = start + tl.arange(0, ADDED)
        theirs = tl.load(sizes + other, other < chunk, other=0)
        theirs = tl.where(tl.load(statuses + other, other < chunk, other=0) == 0, theirs, 0)
        before += (theirs + 15) // 16 * 2
    place = first + tl.sum(before, 0)
    size = tl.where(tl.load(statuses + chunk) == 0, tl.load(sizes + chunk), 0)
    if packer == 0:
        tl.store(table + chunk, size.to(tl.int32))
        # The table ends in zeros, up to the first chunk.
        rest = count + chunk
        if rest < entries:
            tl.store(table + rest, 0)
    source, target = rooms + chunk.to(tl.int64) * room, words + place
    whole = (size + 15) // 16 * 2
    for start in range(packer * PACKED, whole, PACKERS * PACKED):
        number = start + tl.arange(0, PACKED)
        word = tl.load(source + number, number * 8 < size, other=0)
        left = tl.minimum(size - number * 8, 8)
        # Past the end of the chunk lies what was in the memory before: zeros are sent.
        word = tl.where(left < 8, word & ((tl.full((PACKED,), 1, tl.int64) << (tl.maximum(left, 0) * 8)) - 1), word)
        tl.store(target + number, word, number < whole)


@triton.jit  # type: ignore[untyped-decorator]
def _tables(  # type: ignore[no-untyped-def]
    ranks, means, step, place, floats, channels, widest, RANKED: tl.constexpr, AMONG: tl.constexpr
):
    own = tl.program_id(0) * RANKED + tl.arange(0, RANKED)
    rank = tl.load(ranks + own, own < channels, other=0).to(tl.int32)
    before = tl.zeros((RANKED,), tl.int32)
    for start in range(0, channels, AMONG):
        other = start + tl.arange(0, AMONG)
        theirs = tl.load(ranks + other, other < channels, other=0).to(tl.int32)
        before += earlier(rank, own, theirs, other, channels)
    tabulate(rank, own, before, tl.load(step), means, place, floats, channels, widest)


@triton.jit
def earlier(rank, own, theirs, other, channels):  # type: ignore[no-untyped-def]
    """How many of the ``other`` channels come before each of ``own`` in the coded order."""
    theirs = tl.where(other < channels, theirs, 256)
    lower = theirs[None, :] < rank[:, None]
    alike = (theirs[None, :] == rank[:, None]) & (other[None, :] < own[:, None])
    return tl.sum((lower | alike).to(tl.int32), 1)


@triton.jit
def tabulate(rank, own, before, step, means, place, floats, channels, widest):  # type: ignore[no-untyped-def]
    """Write what `Lattice.of` has of the channels ``own``."""
    known = own < channels
    tl.store(place + own, before.to(tl.int64), known)
    scale = step * tl.exp2(tl.maximum(rank - widest, 0).to(tl.float32) / 4)
    scale = tl.where(step > 0, tl.where(rank > 0, scale, 0.0), 0.0)
    tl.store(floats + own, tl.load(means + own, known, other=0.0).to(tl.float32), known)
    tl.store(floats + channels + own, scale, known)
    tl.store(floats + 2 * channels + own, 1.0 / scale, known)
