"""The portable lossy codec: one common quantiser step for all channels, round to nearest, entropy coding by zstandard.

A tensor [..., channels] is seen as [channels, tokens]; each channel's mean is taken off, the channels are sorted by
their deviation and cut into pieces, so that each piece has symbols of like statistics and its own code tables. What
a piece's packing cannot hold, non-finite elements included, crosses exactly as an outlier: nothing is clipped.

Buffers: 0 the table (per piece: packing as uint8; then per piece: coded size as uint32, little endian), 1 the
channels (rank as uint8 each; mean as bfloat16 each), 2 the pieces one after the other, 3 the outliers. 1, 3 and each
piece are zstandard frames. Header: ``dtype``, ``shape``, ``step``, ``outliers`` (their number). An empty tensor has
no buffers.

Must not know models, links or what an error does to a picture. Stateless: every tensor stands for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesh_codec.base import Codec, Decoder, Encoded, Encoder, Limits, Quality
from mesh_codec.errors import CodecCorrupt, CodecUnsupported
from mesh_codec.outliers import MAX_ELEMENTS, Outliers, read_outliers
from mesh_codec.payload import Form, flat_bytes, form_of, read_form, whole_number
from mesh_codec.quantiser import Bits, Cut, Grid, Quantiser, bits_of, coded_order, extent
from mesh_codec.spread import measure
from mesh_codec.symbols import PACKINGS, RADIUS, Packing, Symbols, check_frame, choose_packing, expand, squeeze

FORMAT = "step-zstd-1"

STEPS: Mapping[Quality, float] = MappingProxyType({"transparent": 0.1, "balanced": 0.2, "fast": 0.36})
"""Quantiser step in standard deviations. On a trained 28 M parameter model of the FLUX.2 architecture, 28 steps, the
final image keeps 45.0, 38.6 and 31.5 dB PSNR, minimum over prompts."""

_STEP_LIMITS = (1e-3, 8.0)

_THREADS = 4
"""Sixteen, on as many cores, encoded no faster than two: the steps between numpy calls wait for the interpreter."""


class EntropyCodec(Codec):
    """Quantises float16, bfloat16 and float32. Settings: ``step``, relative to the channels' deviation."""

    name: ClassVar[str] = "entropy"

    def capabilities(self) -> dict[str, Any]:
        return {"formats": [FORMAT]}

    def settings(self, quality: Quality, peer: Mapping[str, Any]) -> dict[str, Any]:
        if quality not in STEPS:
            raise CodecUnsupported(f"The entropy codec has no quality {quality!r}.", hint="the raw codec is lossless")
        formats = peer.get("formats")
        if not isinstance(formats, list | tuple) or FORMAT not in formats:
            raise CodecUnsupported(
                f"The other end's entropy codec has the formats {str(formats)[:80]}, this end has {FORMAT}.",
                hint="the same version of comfyui-mesh-codec at both ends",
            )
        return {"step": STEPS[quality]}

    def encoder(self, settings: Mapping[str, Any]) -> EntropyEncoder:
        return EntropyEncoder(_step(settings), self._pool)

    def decoder(self, settings: Mapping[str, Any], limits: Limits = Limits()) -> EntropyDecoder:  # noqa: B008
        _step(settings)
        return EntropyDecoder(limits, self._pool)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(min(_THREADS, torch.get_num_threads()), thread_name_prefix="mesh-entropy")


def _step(settings: Mapping[str, Any]) -> float:
    step: Any = settings.get("step")
    lowest, highest = _STEP_LIMITS
    if set(settings) != {"step"} or type(step) not in (int, float) or not lowest <= step <= highest:
        raise CodecUnsupported(
            f"The entropy codec cannot use the settings {str(dict(settings))[:80]}.",
            hint=f"{{'step': x}} with x from {lowest} to {highest}",
        )
    return float(step)


class EntropyEncoder(Encoder):
    def __init__(self, relative_step: float, pool: ThreadPoolExecutor) -> None:
        self._relative_step, self._pool = relative_step, pool

    def encode(self, tensor: Tensor) -> Encoded:
        form = form_of(tensor)
        _check_form(form)
        if not form.elements:
            return Encoded(form.header() | {"step": 0.0, "outliers": 0}, ())
        grid = Grid.of(form)
        by_channel = tensor.detach().cpu().reshape(grid.tokens, grid.channels).t().contiguous()
        spread = measure(by_channel, self._relative_step)
        order = coded_order(spread.ranks.numpy())
        quantiser = Quantiser(form.dtype, order, spread.means.float().numpy()[order, None], spread.step)
        matrix, cuts = bits_of(by_channel), grid.pieces()
        pieces = list(self._pool.map(lambda cut: _code_piece(*quantiser.symbols(matrix, cut)), cuts))
        exact = _outliers(matrix, order, cuts, [piece.places for piece in pieces])
        table = np.array([p.packing for p in pieces], dtype=np.uint8).tobytes()
        table += np.array([len(p.frame) for p in pieces], dtype="<u4").tobytes()
        sides = squeeze(np.concatenate([spread.ranks.numpy(), bits_of(spread.means).astype("<u2").view(np.uint8)]))
        header = form.header() | {"step": spread.step, "outliers": len(exact.positions)}
        return Encoded(header, (table, sides, b"".join(p.frame for p in pieces), exact.to_bytes()))


class EntropyDecoder(Decoder):
    def __init__(self, limits: Limits, pool: ThreadPoolExecutor) -> None:
        self._limits, self._pool = limits, pool

    def decode(self, encoded: Encoded, device: torch.device | str = "cpu") -> Tensor:
        form = read_form(encoded.header, self._limits)
        if not form.dtype.lossy or form.elements > MAX_ELEMENTS:
            raise CodecCorrupt(f"A payload announces {form.elements} elements of {form.dtype.name}: not entropy coded.")
        step = encoded.header.get("step")
        if type(step) is not float or not 0 <= step <= torch.finfo(torch.float32).max:
            raise CodecCorrupt(f"A payload's 'step' is {str(step)[:40]}, not a float32 number from 0.")
        count = whole_number(encoded.header, "outliers", form.elements)
        expected = 4 if form.elements else 0
        if len(encoded.buffers) != expected:
            raise CodecCorrupt(f"A coded tensor came in {len(encoded.buffers)} buffers where {expected} belong.")
        if not expected:
            return torch.empty(form.shape, dtype=form.dtype.torch, device=device)
        table, sides, frames, exact = (flat_bytes(b, None, "payload") for b in encoded.buffers)
        grid = Grid.of(form)
        coded = _split(grid, table, frames)
        order, means = _read_channels(sides, grid.channels)
        outliers = read_outliers(exact, count, form.dtype.itemsize, form.elements)
        by_channel = torch.empty((grid.channels, grid.tokens), dtype=form.dtype.torch)
        quantiser, matrix = Quantiser(form.dtype, order, means[order, None], step), bits_of(by_channel)
        # The list makes the first failure of a piece surface here.
        list(self._pool.map(lambda part: quantiser.restore(part.read(), matrix, part.cut), coded))
        result = by_channel.t().contiguous().view(form.shape)
        bits_of(result).reshape(-1)[outliers.positions] = outliers.values
        return result.to(device)


@dataclass(frozen=True)
class _Piece:
    """One piece, coded; ``places`` (int64) are those of its elements that cross exactly."""

    packing: int
    frame: bytes
    places: NDArray[np.int64]


def _code_piece(symbols: Symbols, wild: NDArray[np.int64]) -> _Piece:
    number = choose_packing(symbols)
    packing = PACKINGS[number]
    places = wild
    if packing.radius < RADIUS:
        beyond = np.flatnonzero(np.abs(symbols) > packing.radius)
        symbols[beyond] = 0
        places = np.union1d(wild, beyond)
    return _Piece(number, squeeze(packing.pack(symbols)), places)


def _outliers(matrix: Bits, order: NDArray[np.int64], cuts: list[Cut], places: list[NDArray[np.int64]]) -> Outliers:
    """Those of ``matrix`` [channels, tokens] at the ``places`` of each piece, in the order of the tensor."""
    found: list[NDArray[np.int64]] = []
    for cut, inside in zip(cuts, places, strict=True):
        row, column = np.divmod(inside, extent(cut)[1])
        found.append((column + cut[1].start) * len(matrix) + order[row + cut[0].start])
    positions = np.sort(np.concatenate(found))
    token, channel = np.divmod(positions, len(matrix))
    return Outliers(positions, matrix[channel, token])


@dataclass(frozen=True)
class _Coded:
    """One piece as it came."""

    cut: Cut
    packing: Packing
    frame: memoryview

    def read(self) -> NDArray[np.int8] | Symbols:
        """Its symbols, flat."""
        high, wide = extent(self.cut)
        packed = expand(self.frame, self.packing.size(high * wide), "symbols")
        return self.packing.unpack(packed, high * wide)


def _split(grid: Grid, table: memoryview, frames: memoryview) -> list[_Coded]:
    # The size of the table bounds the work for a payload that announces much and holds little.
    count = grid.piece_count
    flat_bytes(table, 5 * count, "table")
    packings = np.frombuffer(table[:count], dtype=np.uint8)
    if packings.max() >= len(PACKINGS):
        raise CodecCorrupt(f"A payload uses packing {packings.max()}, the last known is {len(PACKINGS) - 1}.")
    ends = list(accumulate(np.frombuffer(table[count:], dtype="<u4").tolist()))
    if ends[-1] != frames.nbytes:
        raise CodecCorrupt(f"The pieces of a payload have {frames.nbytes} bytes where {ends[-1]} belong.")
    coded = [
        _Coded(cut, PACKINGS[packing], frames[start:end])
        for cut, packing, start, end in zip(grid.pieces(), packings, [0, *ends[:-1]], ends, strict=True)
    ]
    for part in coded:
        high, wide = extent(part.cut)
        check_frame(part.frame, part.packing.size(high * wide), "symbols")
    return coded


def _read_channels(frame: memoryview, channels: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Order and means of the channels."""
    data = expand(frame, 3 * channels, "channels")
    means = (data[channels:].copy().view("<u2").astype(np.uint32) << 16).view(np.float32)
    if not np.isfinite(means).all():
        raise CodecCorrupt("The channel means of a payload are not finite.")
    return coded_order(data[:channels]), means


def _check_form(form: Form) -> None:
    if not form.dtype.lossy:
        raise CodecUnsupported(f"The entropy codec does not carry {form.dtype.name}.", hint="the raw codec")
    if form.elements > MAX_ELEMENTS:
        raise CodecUnsupported(f"A tensor of {form.elements} elements is too large to code.", hint="the raw codec")
