"""The bitstream of the entropy codec, and the state of its two ends.

Buffers: 0 the table (`mesh_codec.pieces`), 1 the channels (rank as uint8 each; mean as bfloat16 each; empty where the
tensor is predicted), 2 the pieces' frames one after the other, 3 the outliers. 1, 3 and the frames are zstandard.
An empty tensor has no buffers.

Header: ``dtype``, ``shape``, ``step``, ``outliers`` (their number), ``frame`` (number of the tensor in its stream),
``reference`` (the digest of the tensor that it is predicted from; empty in a key frame). A key frame fixes means and
order of the channels for the predicted ones that follow.

The loop is closed over whole numbers: encoder and decoder keep the same symbols, and a symbol is always the nearest
to its element, so no error is carried on. An outlier's symbol is 0, or in a piece of changes what it was before.

Must not know models, links or what an error does to a picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesh_codec.base import DecodeLimits, Decoder, Encoded, Encoder
from mesh_codec.channels import pack_channels, read_channels
from mesh_codec.errors import CodecCorrupt, CodecStateLost
from mesh_codec.lossy import check_lossy_form, read_lossy_form
from mesh_codec.outliers import Outliers, read_outliers
from mesh_codec.payload import Form, buffers_of, flat_bytes, form_of, positive_number, whole_number
from mesh_codec.pieces import Coded, Packed, cheapest, pack, read_table, sample_of, table
from mesh_codec.quantiser import Bits, Cut, Grid, bits_of, coded_order, extent
from mesh_codec.reference import Reference, chain
from mesh_codec.spread import Spread, measure
from mesh_codec.symbols import RADIUS, Symbols

_MOST_FRAMES = 1 << 62

_Standing = tuple[Reference | None, int]
"""What an end is restored to: its reference, which no later tensor changes, and the number of the next tensor."""


class EntropyEncoder(Encoder):
    """``relative_step`` is in standard deviations; pieces of a tensor are coded side by side in ``pool``."""

    def __init__(self, relative_step: float, temporal: bool, pool: ThreadPoolExecutor) -> None:
        self._relative_step, self._temporal, self._pool = relative_step, temporal, pool
        self._reference: Reference | None = None
        self._frame = 0

    def reset(self) -> None:
        self._reference = None

    def state(self) -> object:
        return self._reference, self._frame

    def restore(self, state: object) -> None:
        self._reference, self._frame = cast(_Standing, state)

    def encode(self, tensor: Tensor) -> Encoded:
        form = form_of(tensor)
        check_lossy_form(form, "entropy")
        # Should anything fail below, the next tensor is a key frame.
        reference, self._reference = self._reference, None
        frame, self._frame = self._frame, self._frame + self._temporal
        if not form.elements:
            return Encoded(form.header() | _facts(0.0, 0, frame, b""), ())
        grid = Grid.of(form)
        by_channel = tensor.detach().cpu().reshape(grid.tokens, grid.channels).t().contiguous()
        spread, matrix = measure(by_channel, self._relative_step), bits_of(by_channel)
        pieces: list[tuple[Packed, NDArray[np.int64]]] = []
        before, sides = b"", b""
        if reference is not None and reference.serves(form, spread.step):
            before = reference.digest
            reference = reference.rescaled(reference.kept_step(spread.step), grid.pieces())
            pieces = self._code(matrix, grid, reference, predict=True)
        if reference is None or not any(piece.predicted for piece, _ in pieces):
            before, sides = b"", pack_channels(spread.ranks, spread.means)
            reference = _key(form, spread)
            pieces = self._code(matrix, grid, reference, predict=False)
        exact = _outliers(matrix, reference.order, grid.pieces(), [places for _, places in pieces])
        packed = [piece for piece, _ in pieces]
        frames = b"".join(f for piece in packed for f in piece.frames)
        buffers = (table(packed), sides, frames, exact.to_bytes())
        if self._temporal:
            reference.digest = chain(before, form, reference.step, buffers)
            self._reference = reference
        return Encoded(form.header() | _facts(reference.step, len(exact.positions), frame, before), buffers)

    def _code(
        self, matrix: Bits, grid: Grid, reference: Reference, *, predict: bool
    ) -> list[tuple[Packed, NDArray[np.int64]]]:
        quantiser = reference.quantiser

        def one(cut: Cut) -> tuple[Packed, NDArray[np.int64]]:
            symbols, wild = quantiser.symbols(matrix, cut)
            return _code_piece(symbols, wild, reference.symbols[cut], predict), wild

        return list(self._pool.map(one, grid.pieces()))


class EntropyDecoder(Decoder):
    """The other end of `EntropyEncoder`, ``temporal`` as that one is."""

    def __init__(self, temporal: bool, limits: DecodeLimits, pool: ThreadPoolExecutor) -> None:
        self._temporal, self._limits, self._pool = temporal, limits, pool
        self._reference: Reference | None = None
        self._next = 0

    def reset(self) -> None:
        self._reference = None
        self._next = 0

    def state(self) -> object:
        return self._reference, self._next

    def restore(self, state: object) -> None:
        self._reference, self._next = cast(_Standing, state)

    def decode(self, encoded: Encoded, device: torch.device | str = "cpu") -> Tensor:
        form = read_lossy_form(encoded.header, self._limits, "entropy")
        step, count, frame, before = _read_facts(encoded.header, form)
        self._check_turn(frame, before)
        buffers = buffers_of(encoded, form, 4)
        if not buffers:
            self._advance(frame, None)
            return form.empty(device)
        listed, sides, frames, exact = buffers
        grid = Grid.of(form)
        coded = read_table(listed, frames, grid.piece_sizes())
        outliers = read_outliers(exact, count, form.dtype.itemsize, form.elements)
        reference = self._predicting(form, step, grid, sides) if before else None
        if reference is None:
            if any(piece.predicted for piece in coded):
                raise CodecCorrupt("A key frame holds changes.")
            ranks, means = read_channels(sides, grid.channels)
            reference = _key(form, Spread(means, ranks, step))
        by_channel = torch.empty((grid.channels, grid.tokens), dtype=form.dtype.torch)
        matrix, quantiser = bits_of(by_channel), reference.quantiser

        def one(part: tuple[Coded, Cut]) -> None:
            symbols = reference.symbols[part[1]]
            _read_piece(part[0], symbols)
            quantiser.restore(symbols, matrix, part[1])

        # Only reading all results raises the first error of a piece here.
        list(self._pool.map(one, zip(coded, grid.pieces(), strict=True)))
        result = by_channel.t().contiguous().view(form.shape)
        bits_of(result).reshape(-1)[outliers.positions] = outliers.values
        reference.digest = chain(before, form, step, encoded.buffers) if self._temporal else b""
        self._advance(frame, reference)
        return result.to(device)

    def _check_turn(self, frame: int, before: bytes) -> None:
        """Raises:
        CodecCorrupt: a predicted tensor where no prediction was agreed on.
        CodecStateLost: this tensor came before, or the one that it is predicted from did not come.
        """
        if not self._temporal:
            if frame or before:
                raise CodecCorrupt("A payload is part of a sequence, which was not agreed on.")
            return
        if frame < self._next:
            raise CodecStateLost(f"Tensor {frame} came again where {self._next} belongs.", hint="a key frame")
        if before and (self._reference is None or self._reference.digest != before):
            raise CodecStateLost(f"What tensor {frame} was predicted from is not here.", hint="a key frame")

    def _predicting(self, form: Form, step: float, grid: Grid, sides: memoryview) -> Reference:
        reference = self._reference
        if reference is None or not reference.serves(form, step):
            raise CodecCorrupt("A tensor is predicted from one that is nothing like it.")
        flat_bytes(sides, 0, "channels")
        return reference.rescaled(step, grid.pieces())

    def _advance(self, frame: int, reference: Reference | None) -> None:
        if self._temporal:
            self._next, self._reference = frame + 1, reference


def _facts(step: float, outliers: int, frame: int, before: bytes) -> dict[str, Any]:
    return {"step": step, "outliers": outliers, "frame": frame, "reference": before}


def _read_facts(header: Mapping[str, Any], form: Form) -> tuple[float, int, int, bytes]:
    step, before = positive_number(header, "step"), header.get("reference")
    if type(before) is not bytes or len(before) not in (0, 8):
        raise CodecCorrupt(f"A payload's 'reference' is {str(before)[:40]}, not a digest of 8 bytes, nor empty.")
    count = whole_number(header, "outliers", form.elements)
    return step, count, whole_number(header, "frame", _MOST_FRAMES), before


def _key(form: Form, spread: Spread) -> Reference:
    return Reference.empty(form, coded_order(spread.ranks.numpy()), spread.means.float().numpy(), spread.step)


def _code_piece(symbols: Symbols, wild: NDArray[np.int64], before: Symbols, predict: bool) -> Packed:
    """Code flat ``symbols``, as they are or as changes of ``before``, which they then replace."""
    bits, packing = cheapest(sample_of(symbols), len(symbols))
    if predict:
        old = before.reshape(-1)
        fits = _furthest(symbols) + _furthest(old) <= RADIUS
        change_bits, change_packing = cheapest(sample_of(symbols) - sample_of(old), len(symbols)) if fits else (bits, 0)
        if change_bits < bits:
            symbols[wild] = old[wild]
            changes = symbols - old
            before[...] = symbols.reshape(before.shape)
            return pack(changes, change_packing, predicted=True)
    before[...] = symbols.reshape(before.shape)
    return pack(symbols, packing, predicted=False)


def _furthest(symbols: Symbols) -> int:
    return max(-int(symbols.min()), int(symbols.max()))


def _read_piece(piece: Coded, symbols: Symbols) -> None:
    """The inverse of `_code_piece`, in place: ``symbols`` hold those of the tensor before."""
    read = piece.read().reshape(symbols.shape)
    if not piece.predicted:
        symbols[...] = read
        return
    lowest, highest = int(read.min()) + int(symbols.min()), int(read.max()) + int(symbols.max())
    if lowest < -RADIUS or highest > RADIUS:
        raise CodecCorrupt("A payload's changes lead to symbols out of range: none of these exists.")
    symbols += read


def _outliers(matrix: Bits, order: NDArray[np.int64], cuts: list[Cut], places: list[NDArray[np.int64]]) -> Outliers:
    """Those of ``matrix`` [channels, tokens] at the ``places`` of each piece, in the order of the tensor."""
    found: list[NDArray[np.int64]] = []
    for cut, inside in zip(cuts, places, strict=True):
        row, column = np.divmod(inside, extent(cut)[1])
        found.append((column + cut[1].start) * len(matrix) + order[row + cut[0].start])
    positions = np.sort(np.concatenate(found))
    token, channel = np.divmod(positions, len(matrix))
    return Outliers(positions, matrix[channel, token])
