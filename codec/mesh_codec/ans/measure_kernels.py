"""What is measured of tensors before they are quantised, as Triton kernels: few launches, no waiting for the device.

Each does what the function that it names does in plain torch; sums are taken in another order, so that only encoders,
which tell decoders what they chose, may measure with these. Must not know buffers or bitstreams.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mesh_codec import spread
from mesh_codec.ans.findings import DeviceFindings
from mesh_codec.ans.kernels import AMONG, RANKED, Tables, earlier, new_tables, tabulate
from mesh_codec.ans.launch import aligned, launch
from mesh_codec.channels import widest_rank
from mesh_codec.spread import MEDIAN_EVERY, SAMPLES, stride_of

_FEW = SAMPLES // MEDIAN_EVERY
_CHANNELS = 16
_TOKENS = 64


def describe(tokens: Tensor, means: Tensor) -> Tensor:
    """`mesh_codec.spread.describe` of contiguous ``tokens`` [tokens, channels], more than one channel: the deviations;
    the means are written into ``means``."""
    rows, columns = tokens.shape
    stride = stride_of(columns, rows)
    deviations = torch.empty(columns, dtype=torch.float64, device=tokens.device)
    launch(
        _describe, (triton.cdiv(columns, _CHANNELS), 1), (rows, columns, tokens.dtype, aligned(tokens, means)),
        tokens, deviations, means, columns, stride, -(-rows // stride),
        spread.REACH, spread.DEVIATION_PER_MAD, MEDIAN_EVERY, SAMPLES, _FEW, _CHANNELS,
    )  # fmt: skip
    return deviations


def settle(deviations: Tensor, relative_step: float, findings: DeviceFindings, radius: int) -> Tables:
    """`mesh_codec.spread.settle`, into ``findings``; returns what `mesh_codec.ans.kernels.tables` makes of them."""
    channels = len(deviations)
    every = -(-channels // spread.CHANNELS)
    place, floats, found = new_tables(channels, deviations.device)
    launch(
        _settle, (triton.cdiv(channels, RANKED), 1), (channels, radius, aligned(findings.ranks, findings.means)),
        deviations, findings.ranks, findings.means, findings.step, place, floats,
        float(relative_step), spread.CAP, *spread.STEP_RANGE, channels, every, widest_rank(radius),
        spread.CHANNELS, RANKED, AMONG, num_warps=8,
    )  # fmt: skip
    return found


def compare(tokens: Tensor, state: Tensor, place: Tensor, means: Tensor, inverse: Tensor, every: int) -> Tensor:
    """`Lattice.compare`; ``place``, ``means`` and ``inverse`` are the lattice's."""
    rows, columns = tokens.shape
    sizes = torch.empty(2, columns, dtype=torch.float32, device=tokens.device)
    launch(
        _compare, (triton.cdiv(columns, _CHANNELS), 1), (rows, columns, tokens.dtype, every, aligned(tokens)),
        tokens, state, place, means, inverse, sizes, rows, columns, every, -(-rows // every), _TOKENS, _CHANNELS,
    )  # fmt: skip
    return sizes


@triton.jit  # type: ignore[untyped-decorator]
def _describe(  # type: ignore[no-untyped-def]
    tokens, deviations, means, columns, stride, count, reach, per_mad,
    EVERY: tl.constexpr, SAMPLES: tl.constexpr, FEW: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[:, None]
    first = tokens + column
    number = tl.arange(0, FEW)[None, :]
    of_few = (count + EVERY - 1) // EVERY
    few = tl.load(
        first + (number * EVERY).to(tl.int64) * stride * columns, (column < columns) & (number < of_few), other=0.0
    ).to(tl.float32)
    few = tl.where(tl.abs(few) < float("inf"), few, 0.0)
    middle = number == (of_few - 1) // 2
    ordered = tl.sort(tl.where(number < of_few, few, float("inf")), 1)
    centre = tl.sum(tl.where(middle, ordered, 0.0), 1)[:, None]
    ordered = tl.sort(tl.where(number < of_few, tl.abs(few - centre), float("inf")), 1)
    typical = tl.sum(tl.where(middle, ordered, 0.0), 1)[:, None] * per_mad
    farthest = tl.where(typical > 0, typical * reach, float("inf"))
    number = tl.arange(0, SAMPLES)[None, :]
    there = number < count
    sample = tl.load(first + number.to(tl.int64) * stride * columns, (column < columns) & there, other=0.0).to(
        tl.float32
    )
    sample = tl.where(tl.abs(sample) < float("inf"), sample, 0.0)
    sample = tl.where(tl.abs(sample - centre) <= farthest, sample, centre).to(tl.float64)
    mean = tl.sum(tl.where(there, sample, 0.0), 1)[:, None] / count
    apart = tl.where(there, sample - mean, 0.0)
    deviation = tl.sqrt(tl.sum(apart * apart, 1)[:, None] / count)
    coded = mean.to(tl.float32).to(tl.bfloat16)
    coded = tl.where(tl.abs(coded.to(tl.float32)) < float("inf"), coded, 0.0)
    tl.store(deviations + column, deviation, column < columns)
    tl.store(means + column, coded, column < columns)


@triton.jit  # type: ignore[untyped-decorator]
def _settle(  # type: ignore[no-untyped-def]
    deviations, ranks, means, step, place, floats, relative, cap, lowest, highest, count, every, widest,
    LANES: tl.constexpr, RANKED: tl.constexpr, AMONG: tl.constexpr,
):  # fmt: skip
    # Every program works the step out by itself: that takes less than another launch.
    number = tl.arange(0, LANES) * every
    few = tl.load(deviations + number, number < count, other=0.0).to(tl.float32)
    vary = tl.sum((few > 0).to(tl.int32), 0)
    ordered = tl.sort(tl.where(few > 0, few, float("inf")))
    # Where none of the few varies, this is infinite.
    largest = (
        tl.sum(tl.where(tl.arange(0, LANES) == tl.maximum(vary - 1, 0) // 2, ordered, 0.0), 0).to(tl.float64) * cap
    )
    total = tl.zeros((LANES,), tl.float64)
    varying = tl.zeros((LANES,), tl.int32)
    for start in range(0, count, LANES):
        number = start + tl.arange(0, LANES)
        deviation = tl.load(deviations + number, number < count, other=0.0)
        capped = tl.where(deviation > 0, tl.minimum(deviation, largest), 0.0)
        total += capped * capped
        varying += (deviation > 0).to(tl.int32)
    number_varying = tl.sum(varying, 0)
    exact = tl.sqrt(tl.sum(total, 0) / tl.maximum(number_varying, 1)) * relative
    exact = tl.minimum(tl.maximum(exact, lowest), highest)
    chosen = tl.where(number_varying > 0, exact, 0.0).to(tl.float32)
    own = tl.program_id(0) * RANKED + tl.arange(0, RANKED)
    rank = _rank(tl.load(deviations + own, own < count, other=0.0), chosen)
    before = tl.zeros((RANKED,), tl.int32)
    for start in range(0, count, AMONG):
        other = start + tl.arange(0, AMONG)
        theirs = _rank(tl.load(deviations + other, other < count, other=0.0), chosen)
        before += earlier(rank, own, theirs, other, count)
    tabulate(rank, own, before, chosen, means, place, floats, count, widest)
    tl.store(ranks + own, rank.to(tl.uint8), own < count)
    if tl.program_id(0) == 0:
        tl.store(step, chosen)


@triton.jit
def _rank(deviation, step):  # type: ignore[no-untyped-def]
    varies = tl.where(step > 0, deviation, 0.0) > 0
    steps = tl.where(varies, deviation / tl.where(step > 0, step, 1.0), 1.0).to(tl.float32)
    rank = tl.floor(tl.log2(steps) * 4 + 128.5)
    return tl.where(varies, tl.minimum(tl.maximum(rank, 0.0), 255.0), 0.0).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _compare(  # type: ignore[no-untyped-def]
    tokens, state, place, means, inverse, sizes, rows, columns, every, count,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    known = column < columns
    mean = tl.load(means + column, known, other=0.0)
    steps = tl.load(inverse + column, known, other=0.0)
    line = tl.load(place + column, known, other=0) * rows
    own = tl.zeros((ROWS, COLUMNS), tl.float32)
    change = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, ROWS):
        number = (start + tl.arange(0, ROWS))[:, None]
        row = number.to(tl.int64) * every
        there = (number < count) & known
        value = tl.load(tokens + row * columns + column, there, other=0.0).to(tl.float32)
        offset = (value - mean) * steps
        # Elements that will cross exactly are left out, and channels that do not vary.
        offset = tl.where(there & (tl.abs(offset) <= 32767.0), offset, 0.0)
        before = tl.load(state + line + row, there, other=0).to(tl.float32)
        own += tl.abs(offset)
        change += tl.abs(offset - before)
    number = tl.arange(0, 2)[:, None]
    means_of = tl.where(number == 0, tl.sum(own, 0)[None, :], tl.sum(change, 0)[None, :]) / count
    tl.store(sizes + number * columns + column, means_of, known)
