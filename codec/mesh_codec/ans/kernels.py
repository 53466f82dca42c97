"""`Lattice.quantise` and `Lattice.restore` as Triton kernels: one read and one write of each array.

A program takes a tile of tokens and channels, reads it along channels and writes it along tokens: both are contiguous,
the transposition happens in registers. Same arithmetic as in `mesh_codec.ans.lattice`. Triton looks annotations up as it compiles, so that its
functions have none but its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from mesh_codec.ans.lattice import Lattice

_TOKENS, _CHANNELS = 128, 32
_ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2**23: added to a float32 of at most 2**22 and taken off again, it rounds to nearest, ties to even."""

_SHARE_LISTED = 32
"""One element in so many may lie outside and still be listed by the kernel."""


def quantise(lattice: Lattice, tokens: Tensor, state: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    tokens = tokens.contiguous()
    rows, columns = tokens.shape
    symbols = torch.empty(state.shape, dtype=torch.int8, device=state.device)
    room = max(1024, tokens.numel() // _SHARE_LISTED)
    listed = torch.empty(room, dtype=torch.int64, device=state.device)
    count = torch.zeros(1, dtype=torch.int32, device=state.device)
    _quantise[_tiles(rows, columns)](
        tokens, state, symbols, lattice.place, lattice.means, lattice.inverse, lattice.scales, predicted,
        listed, count, room, rows, columns, _TOKENS, _CHANNELS,
    )  # fmt: skip
    found = int(count.item())
    places = listed[:found].sort().values if found <= room else lattice.outside(tokens, state)
    return symbols, places


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
    tokens, state, symbols, place, means, inverse, scales, predicted, listed, count, room, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    there = (row < rows) & (column < columns)
    known = column < columns
    mean = tl.load(means + column, known, other=0.0)
    scale = tl.load(scales + column, known, other=0.0)
    value = tl.load(tokens + row.to(tl.int64) * columns + column, there, other=0.0).to(tl.float32)
    offset = (value - mean) * tl.load(inverse + column, known, other=0.0)
    offset = tl.where((scale == 0) & (value == mean), 0.0, offset)
    inside = (offset >= -32767.5) & (offset <= 32767.5)
    whole = tl.where(inside, offset, 0.0)
    whole = ((whole + _ROUNDER) - _ROUNDER).to(tl.int32)
    target = tl.load(place + column, known, other=0) * rows + row
    base = tl.load(state + target, there, other=0).to(tl.int32)
    base = tl.where(tl.load(predicted + column, known, other=0) != 0, base, 0)
    symbol = whole - base
    inside = inside & (symbol >= -127) & (symbol <= 127) & (whole >= -32767) & (whole <= 32767)
    symbol = tl.where(inside, symbol, 0)
    tl.store(symbols + target, symbol.to(tl.int8), there)
    tl.store(state + target, (base + symbol).to(tl.int16), there)
    outside = there & (inside == 0)
    number = tl.atomic_add(count + tl.zeros((ROWS, COLUMNS), tl.int32), 1, mask=outside)
    tl.store(listed + number, row.to(tl.int64) * columns + column, outside & (number < room))


@triton.jit  # type: ignore[untyped-decorator]
def _restore(  # type: ignore[no-untyped-def]
    symbols, state, tokens, place, means, scales, predicted, largest, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    there = (row < rows) & (column < columns)
    known = column < columns
    source = tl.load(place + column, known, other=0) * rows + row
    base = tl.load(state + source, there, other=0).to(tl.int32)
    base = tl.where(tl.load(predicted + column, known, other=0) != 0, base, 0)
    whole = (base + tl.load(symbols + source, there, other=0).to(tl.int32)).to(tl.int16)
    tl.store(state + source, whole, there)
    value = whole.to(tl.float32) * tl.load(scales + column, known, other=0.0)
    value = value + tl.load(means + column, known, other=0.0)
    value = tl.minimum(tl.maximum(value, -largest), largest)
    tl.store(tokens + row.to(tl.int64) * columns + column, value.to(tokens.dtype.element_ty), there)
