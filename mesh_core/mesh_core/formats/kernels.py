"""Numbers of stored weights as Triton kernels: codes are read once and numbers written once.

The bits are those of the plain torch arithmetic, in which each operation rounds. Three things keep it so:

- Products and differences that torch rounds to half precision are operations on half precision here. torch computes
  them in float32 and rounds that, which gives the same bits: float32 holds more than twice the digits, and a bit more,
  of half precision, so that rounding twice is rounding once.
- Kernels are compiled without fusing (``enable_fp_fusion=False``): a product that goes into a difference would not be
  rounded in between. What they are compiled to has ``mul.rn``, ``add.rn`` and ``sub.rn``, which the assembler never
  joins, and no ``fma``.
- float8 becomes float32 by its bits, which every card can do. bfloat16 is rounded by the card's own instruction, or by
  integers where it has none, and in Triton's interpreter, whose own rounds otherwise.

Nothing is flushed to zero: Triton's operations on float32 keep subnormal numbers, as torch's do.

A function takes contiguous tensors on the current device, and writes contiguous ``numbers`` of bfloat16, half precision
or float32.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mesh_codec.ans.launch import aligned, launch

_ACROSS, _BLOCKS_OF_16, _BLOCKS_OF_32, _BLOCKS_OF_256 = 2048, 128, 64, 8
"""Numbers, or blocks of so many numbers, that a program makes."""

_SMALL = {"Q4_0": (18, False, False), "Q4_1": (20, True, False), "Q5_0": (22, False, True), "Q5_1": (24, True, True)}
"""Bytes of a block; whether it has an offset; whether it has fifth bits."""

_LARGE = {"Q4_K": (144, False), "Q5_K": (176, True)}

GGML = frozenset({*_SMALL, *_LARGE, "Q8_0", "Q6_K"})
"""The kinds that `ggml` makes numbers of."""


def fp8(codes: Tensor, scales: Tensor | None, numbers: Tensor, once: bool) -> None:
    """Codes times scales.

    Args:
        codes: [rows, columns] float8_e4m3fn or float8_e5m2.
        scales: float32, one of all or one per row; None for 1.
        numbers: [rows, columns].
        once: only the product is rounded to ``numbers``' type; else the scales before it too.
    """
    by_row = scales is not None and scales.numel() > 1
    rows, columns = (len(codes), codes[0].numel()) if by_row else (1, codes.numel())
    across = triton.cdiv(columns, _ACROSS)
    raw, e5m2, scaled = codes.view(torch.uint8), codes.dtype == torch.float8_e5m2, scales is not None
    factors = scales if scales is not None else raw
    key = (rows, columns, codes.dtype, numbers.dtype, scaled, by_row, once, aligned(codes, numbers, factors))
    launch(
        _fp8, (rows * across, 1), key,
        raw, factors, _words(numbers), columns, across, e5m2, scaled, by_row, once, _ACROSS,
        enable_fp_fusion=False,
    )  # fmt: skip


def nvfp4(codes: Tensor, block_scales: Tensor, scales: Tensor, numbers: Tensor, once: bool) -> None:
    """Two numbers to a byte, the first in its high bits, times the product of their scales.

    Args:
        codes: [rows, columns / 2] uint8.
        block_scales: [rows, columns / 16] float8_e4m3fn.
        scales: [rows] float32.
        numbers: [rows, columns].
        once: only the last product is rounded to ``numbers``' type, that of scales to float32; else scales and their
            product are rounded to it before.
    """
    rows, blocks = block_scales.shape
    across = triton.cdiv(blocks, _BLOCKS_OF_16)
    key = (rows, blocks, numbers.dtype, once, aligned(codes, block_scales, scales, numbers))
    launch(
        _nvfp4, (rows * across, 1), key,
        codes, block_scales.view(torch.uint8), scales, _words(numbers), blocks, across, once, _BLOCKS_OF_16,
        enable_fp_fusion=False,
    )  # fmt: skip


def ggml(codes: Tensor, kind: str, numbers: Tensor) -> None:
    """Blocks of ggml in half precision, rounded to ``numbers``' type.

    Args:
        codes: [rows, bytes of a row] uint8, at an even address.
        kind: one of `GGML`.
    """
    halves, words, options = codes.view(torch.float16), _words(numbers), {"enable_fp_fusion": False}
    key = (kind, codes.numel(), numbers.dtype, aligned(codes, numbers))
    if kind in _SMALL:
        size, offset, fifth = _SMALL[kind]
        count = codes.numel() // size
        grid = triton.cdiv(count, _BLOCKS_OF_32), 1
        launch(_ggml_small, grid, key, codes, halves, words, count, size, offset, fifth, _BLOCKS_OF_32, **options)
    elif kind == "Q8_0":
        count = codes.numel() // 34
        grid = triton.cdiv(count, _BLOCKS_OF_32), 1
        launch(_ggml_q8_0, grid, key, codes, halves, words, count, _BLOCKS_OF_32, **options)
    elif kind == "Q6_K":
        count = codes.numel() // 210
        grid = triton.cdiv(count, _BLOCKS_OF_256), 1
        launch(_ggml_q6_k, grid, key, codes, halves, words, count, _BLOCKS_OF_256, **options)
    else:
        size, fifth = _LARGE[kind]
        count = codes.numel() // size
        grid = triton.cdiv(count, _BLOCKS_OF_256), 1
        launch(_ggml_k, grid, key, codes, halves, words, count, size, fifth, _BLOCKS_OF_256, **options)


def _words(numbers: Tensor) -> Tensor:
    """Those of bfloat16 as integers, by which kernels know it, unless the card rounds to it by itself."""
    as_they_are = numbers.dtype != torch.bfloat16 or (numbers.is_cuda and _rounds(numbers.get_device()))
    return numbers if as_they_are else numbers.view(torch.int16)


@cache
def _rounds(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _fp8(  # type: ignore[no-untyped-def]
    codes, scales, numbers, columns, across,
    E5M2: tl.constexpr, SCALED: tl.constexpr, BY_ROW: tl.constexpr, ONCE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // across
    column = (tl.program_id(0) % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < columns
    place = row.to(tl.int64) * columns + column
    code = tl.load(codes + place, there, other=0)
    value = _from_e5m2(code) if E5M2 else _from_e4m3(code)
    if SCALED:
        scale = tl.load(scales + row) if BY_ROW else tl.load(scales)
        value = value * (scale if ONCE else _rounded(scale, numbers))
    tl.store(numbers + place, _as_stored(value, numbers), there)


@triton.jit  # type: ignore[untyped-decorator]
def _nvfp4(  # type: ignore[no-untyped-def]
    codes, block_scales, scales, numbers, blocks, across, ONCE: tl.constexpr, BLOCKS: tl.constexpr
):
    row = tl.program_id(0) // across
    block = (tl.program_id(0) % across) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < blocks
    block = row.to(tl.int64) * blocks + block
    scale = tl.load(scales + row)
    block_scale = _from_e4m3(tl.load(block_scales + block, there, other=0))
    scale = scale * block_scale if ONCE else _rounded(_rounded(scale, numbers) * block_scale, numbers)
    code = tl.load(codes + block[:, None] * 8 + tl.arange(0, 8)[None, :], there[:, None], other=0)
    first = _as_stored(_from_e2m1(code >> 4) * scale[:, None], numbers)
    second = _as_stored(_from_e2m1(code & 15) * scale[:, None], numbers)
    place = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(numbers + place, tl.interleave(first, second), there[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _ggml_small(  # type: ignore[no-untyped-def]
    codes, halves, numbers, count, SIZE: tl.constexpr, OFFSET: tl.constexpr, FIFTH: tl.constexpr, BLOCKS: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    number = tl.arange(0, 32)[None, :]
    there = block < count
    scale = tl.load(halves + block * (SIZE // 2), there, other=0.0)
    byte = tl.load(codes + block * SIZE + (SIZE - 16) + number % 16, there, other=0).to(tl.int32)
    value = (byte >> (number // 16 * 4)) & 15
    if FIFTH:
        bits = tl.load(codes + block * SIZE + (SIZE - 20) + number // 8, there, other=0).to(tl.int32)
        value = value | (((bits >> (number % 8)) & 1) << 4)
    if OFFSET:
        offset = tl.load(halves + block * (SIZE // 2) + 1, there, other=0.0)
        result = scale * value.to(tl.float16) + offset
    else:
        result = scale * (value - (16 if FIFTH else 8)).to(tl.float16)
    tl.store(numbers + block * 32 + number, _as_stored(result, numbers), there)


@triton.jit  # type: ignore[untyped-decorator]
def _ggml_q8_0(codes, halves, numbers, count, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    number = tl.arange(0, 32)[None, :]
    there = block < count
    scale = tl.load(halves + block * 17, there, other=0.0)
    value = tl.load(codes + block * 34 + 2 + number, there, other=0).to(tl.int8, bitcast=True)
    result = scale * value.to(tl.float16)
    tl.store(numbers + block * 32 + number, _as_stored(result, numbers), there)


@triton.jit  # type: ignore[untyped-decorator]
def _ggml_k(  # type: ignore[no-untyped-def]
    codes, halves, numbers, count, SIZE: tl.constexpr, FIFTH: tl.constexpr, BLOCKS: tl.constexpr
):
    # A block is 8 groups of 32 numbers, each with a scale and an offset of six bits.
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None, None]
    group, number = tl.arange(0, 8)[None, :, None], tl.arange(0, 32)[None, None, :]
    there = block < count
    six = codes + block * SIZE + 4 + group % 4
    first, second, third = tl.load(six, there, 0), tl.load(six + 4, there, 0), tl.load(six + 8, there, 0)
    # The upper four groups have four bits in the third byte and two in what the lower groups leave free.
    scale = tl.where(group < 4, first & 63, (third & 15) | ((first >> 2) & 48))
    offset = tl.where(group < 4, second & 63, (third >> 4) | ((second >> 2) & 48))
    scale = tl.load(halves + block * (SIZE // 2), there, other=0.0) * scale.to(tl.float16)
    offset = tl.load(halves + block * (SIZE // 2) + 1, there, other=0.0) * offset.to(tl.float16)
    byte = tl.load(codes + block * SIZE + (SIZE - 128) + group // 2 * 32 + number, there, other=0).to(tl.int32)
    value = (byte >> (group % 2 * 4)) & 15
    if FIFTH:
        bits = tl.load(codes + block * SIZE + 16 + number, there, other=0).to(tl.int32)
        value = value | (((bits >> group) & 1) << 4)
    result = scale * value.to(tl.float16) - offset
    tl.store(numbers + block * 256 + group * 32 + number, _as_stored(result, numbers), there)


@triton.jit  # type: ignore[untyped-decorator]
def _ggml_q6_k(codes, halves, numbers, count, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    # A block is 16 groups of 16 numbers, each with a scale of eight bits.
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None, None]
    group, number = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    there = block < count
    half, quarter, within = group // 8, group // 2 % 4, group % 2 * 16 + number
    scale = tl.load(codes + block * 210 + 192 + group, there, other=0).to(tl.int8, bitcast=True)
    scale = tl.load(halves + block * 105 + 104, there, other=0.0) * scale.to(tl.float16)
    low = tl.load(codes + block * 210 + half * 64 + quarter % 2 * 32 + within, there, other=0).to(tl.int32)
    high = tl.load(codes + block * 210 + 128 + half * 32 + within, there, other=0).to(tl.int32)
    value = ((low >> (quarter // 2 * 4)) & 15) | (((high >> (quarter * 2)) & 3) << 4)
    result = scale * (value - 32).to(tl.float16)
    tl.store(numbers + block * 256 + group * 16 + number, _as_stored(result, numbers), there)


@triton.jit
def _from_e4m3(code):  # type: ignore[no-untyped-def]
    # Sign, exponent and fraction where float32 has them; the product puts the exponent's bias right.
    magnitude = code.to(tl.uint32) & 0x7F
    bits = ((code.to(tl.uint32) & 0x80) << 24) | (magnitude << 20)
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(magnitude == 0x7F, float("nan"), value)


@triton.jit
def _from_e5m2(code):  # type: ignore[no-untyped-def]
    return (code.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _from_e2m1(code):  # type: ignore[no-untyped-def]
    bits = ((code.to(tl.uint32) & 8) << 28) | ((code.to(tl.uint32) & 7) << 22)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def _bits(value):  # type: ignore[no-untyped-def]
    """float32 as bfloat16 in the low half of 32 bits: to nearest, ties to even."""
    bits = value.to(tl.uint32, bitcast=True)
    return tl.where(value == value, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FFF)


@triton.jit
def _rounded(value, numbers):  # type: ignore[no-untyped-def]
    """float32 rounded to the type of ``numbers``, in float32."""
    if numbers.dtype.element_ty == tl.int16:
        value = (_bits(value) << 16).to(tl.float32, bitcast=True)
    else:
        value = value.to(numbers.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def _as_stored(value, numbers):  # type: ignore[no-untyped-def]
    """As ``numbers`` hold it."""
    if numbers.dtype.element_ty == tl.int16:
        value = _bits(value.to(tl.float32)).to(tl.uint16).to(tl.int16, bitcast=True)
    else:
        value = value.to(numbers.dtype.element_ty)
    return value
