"""`Lattice.quantise`, `Lattice.restore` and `fold` as Triton kernels: one read and one write of each array.

A program takes a tile of tokens and channels, reads it along channels and writes it along tokens: both are contiguous,
the transposition happens in registers. Same arithmetic as in `mesh_codec.ans.lattice`. Triton looks annotations up as
it compiles, so that its functions have none but its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from mesh_codec.channels import widest_rank
from mesh_codec.exact import as_integers

if TYPE_CHECKING:
    from mesh_codec.ans.lattice import Lattice
    from mesh_codec.ans.told import Told

_TOKENS, _CHANNELS = 32, 32
_ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2**23: added to a float32 of at most 2**22 and taken off again, it rounds to nearest, ties to even."""

_FOLDED = 4096
_RANKED, _AMONG = 32, 512


def quantise(lattice: Lattice, tokens: Tensor, state: Tensor | None, told: Told, period: int) -> Tensor:
    rows, columns = tokens.shape
    symbols = torch.empty(columns, rows, dtype=torch.int8, device=tokens.device)
    _quantise[_tiles(rows, columns)](
        tokens, as_integers(tokens), symbols if state is None else state, symbols,
        lattice.place, lattice.means, lattice.inverse, lattice.scales, told.predicted, told.listed, told.count,
        told.total, len(told.listed), rows, columns, period, state is not None, _TOKENS, _CHANNELS,
    )  # fmt: skip
    return symbols


def tables(ranks: Tensor, means: Tensor, step: Tensor, radius: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors of `Lattice.of`."""
    channels = len(ranks)
    place = torch.empty(channels, dtype=torch.int64, device=ranks.device)
    floats = torch.empty(3, channels, dtype=torch.float32, device=ranks.device)
    _tables[(triton.cdiv(channels, _RANKED),)](
        ranks, means, step, place, floats, channels, widest_rank(radius), _RANKED, _AMONG
    )
    return place, floats[0], floats[1], floats[2]


def fold(data: Tensor, period: int) -> Tensor:
    total = torch.zeros(1, dtype=torch.int64, device=data.device)
    _fold[(triton.cdiv(data.numel(), _FOLDED),)](data, total, data.numel(), period, _FOLDED)
    return total


def restore(lattice: Lattice, symbols: Tensor, state: Tensor, predicted: Tensor, dtype: torch.dtype) -> Tensor:
    columns, rows = symbols.shape
    tokens = torch.empty(rows, columns, dtype=dtype, device=symbols.device)
    _restore[_tiles(rows, columns)](
        symbols.contiguous(), state, tokens, lattice.place, lattice.means, lattice.scales, predicted,
        torch.finfo(dtype).max, rows, columns, _TOKENS, _CHANNELS,
    )  # fmt: skip
    return tokens


def _tiles(rows: int, columns: int) -> tuple[int, int]:
    return triton.cdiv(rows, _TOKENS), triton.cdiv(columns, _CHANNELS)


@triton.jit  # type: ignore[untyped-decorator]
def _quantise(  # type: ignore[no-untyped-def]
    tokens, bits, state, symbols, place, means, inverse, scales, predicted, listed, count, total, room, rows, columns,
    period, HELD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    there = (row < rows) & (column < columns)
    known = column < columns
    mean = tl.load(means + column, known, other=0.0)
    scale = tl.load(scales + column, known, other=0.0)
    # Indices are those of at most 2**31 elements.
    value = tl.load(tokens + row * columns + column, there, other=0.0).to(tl.float32)
    offset = (value - mean) * tl.load(inverse + column, known, other=0.0)
    offset = tl.where((scale == 0) & (value == mean), 0.0, offset)
    inside = (offset >= -32767.5) & (offset <= 32767.5)
    whole = tl.where(inside, offset, 0.0)
    whole = ((whole + _ROUNDER) - _ROUNDER).to(tl.int32)
    target = tl.load(place + column, known, other=0).to(tl.int32) * rows + row
    symbol = whole
    if HELD:
        follows = tl.load(predicted + column, known, other=0) != 0
        base = tl.load(state + target, there & follows, other=0).to(tl.int32)
        symbol = whole - base
    inside = inside & (symbol >= -127) & (symbol <= 127) & (whole >= -32767) & (whole <= 32767)
    symbol = tl.where(inside, symbol, 0)
    tl.store(symbols + target, symbol.to(tl.int8), there)
    if HELD:
        tl.store(state + target, (base + symbol).to(tl.int16), there)
    outside = there & (inside == 0)
    # Tiles that have any are few.
    if tl.sum(tl.sum(outside.to(tl.int32), 1), 0) > 0:
        number = tl.atomic_add(count + tl.zeros((ROWS, COLUMNS), tl.int32), 1, mask=outside)
        source = row * columns + column
        own = tl.load(bits + source, outside, other=0).to(tl.int64) & 0xFFFFFFFF
        tl.store(listed + number, (source.to(tl.int64) << 32) | own, outside & (number < room))
    byte = tl.where(there, symbol & 0xFF, 0).to(tl.int64)
    tl.atomic_add(total, tl.sum(tl.sum(byte * (target % period + 1), 1), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _restore(  # type: ignore[no-untyped-def]
    symbols, state, tokens, place, means, scales, predicted, largest, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    there = (row < rows) & (column < columns)
    known = column < columns
    source = tl.load(place + column, known, other=0).to(tl.int32) * rows + row
    follows = tl.load(predicted + column, known, other=0) != 0
    base = tl.load(state + source, there & follows, other=0).to(tl.int32)
    whole = (base + tl.load(symbols + source, there, other=0).to(tl.int32)).to(tl.int16)
    tl.store(state + source, whole, there)
    value = whole.to(tl.float32) * tl.load(scales + column, known, other=0.0)
    value = value + tl.load(means + column, known, other=0.0)
    value = tl.minimum(tl.maximum(value, -largest), largest)
    tl.store(tokens + row * columns + column, value.to(tokens.dtype.element_ty), there)


@triton.jit  # type: ignore[untyped-decorator]
def _fold(data, total, size, period, FOLDED: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.program_id(0).to(tl.int64) * FOLDED
    number = tl.arange(0, FOLDED)
    byte = tl.load(data + first + number, first + number < size, other=0).to(tl.int64)
    weight = ((first % period).to(tl.int32) + number) % period + 1
    tl.atomic_add(total, tl.sum(byte * weight, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _tables(  # type: ignore[no-untyped-def]
    ranks, means, step, place, floats, channels, widest, RANKED: tl.constexpr, AMONG: tl.constexpr
):
    own = tl.program_id(0) * RANKED + tl.arange(0, RANKED)
    known = own < channels
    rank = tl.load(ranks + own, known, other=0).to(tl.int32)
    before = tl.zeros((RANKED,), tl.int32)
    for start in range(0, channels, AMONG):
        other = start + tl.arange(0, AMONG)
        theirs = tl.load(ranks + other, other < channels, other=0).to(tl.int32)
        theirs = tl.where(other < channels, theirs, 256)
        first = (theirs[None, :] < rank[:, None]) | (
            (theirs[None, :] == rank[:, None]) & (other[None, :] < own[:, None])
        )
        before += tl.sum(first.to(tl.int32), 1)
    tl.store(place + own, before.to(tl.int64), known)
    size = tl.load(step)
    scale = size * tl.exp2(tl.maximum(rank - widest, 0).to(tl.float32) / 4)
    scale = tl.where(size > 0, tl.where(rank > 0, scale, 0.0), 0.0)
    tl.store(floats + own, tl.load(means + own, known, other=0.0).to(tl.float32), known)
    tl.store(floats + channels + own, scale, known)
    tl.store(floats + 2 * channels + own, 1.0 / scale, known)
