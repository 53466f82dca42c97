"""The uniform quantiser on a tensor seen as [channels, tokens]: how that is cut, elements to symbols and back.

Must not know how symbols are coded. Works on the CPU in numpy, one thread: callers run pieces side by side, where
torch's own thread teams would stand in each other's way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesh_codec.dtypes import DType
from mesh_codec.payload import Form
from mesh_codec.symbols import RADIUS, Symbols

Cut = tuple[slice, slice]
Bits = NDArray[np.unsignedinteger]
"""Elements of a tensor as unsigned integers of their size."""

_UNSIGNED: Mapping[int, torch.dtype] = MappingProxyType({2: torch.uint16, 4: torch.uint32})

_PIECE = 1 << 18
"""Elements of a piece: large beside its code tables, and enough pieces to share among cores."""

_FEWEST_TOKENS = 64
"""Below, means and ranks of the channels would cost more than they save: the tensor is taken as one channel."""


@dataclass(frozen=True)
class Grid:
    """A tensor as [channels, tokens]. Both ends derive it from the shape."""

    channels: int
    tokens: int

    @classmethod
    def of(cls, form: Form) -> Grid:
        """The grid of a tensor of at least one element; its last dimension is the channels."""
        channels = form.shape[-1] if form.shape else 1
        tokens = form.elements // channels
        return cls(channels, tokens) if tokens >= _FEWEST_TOKENS else cls(1, form.elements)

    def piece_sizes(self) -> list[int]:
        """Elements of each of the `pieces`."""
        return [high * wide for high, wide in map(extent, self.pieces())]

    def pieces(self) -> list[Cut]:
        """What is coded by itself: some channels (in the coded order) and tokens."""
        return list(_cuts(self.channels, self.tokens, _PIECE))


def _cuts(rows: int, columns: int, size: int) -> Iterator[Cut]:
    """Whole rows, at most ``size`` elements of them, or parts of one row where that is larger."""
    high, wide = max(1, size // columns), min(size, columns)
    for row in range(0, rows, high):
        for column in range(0, columns, wide):
            yield slice(row, min(row + high, rows)), slice(column, min(column + wide, columns))


def extent(cut: Cut) -> tuple[int, int]:
    """Rows and columns of a cut."""
    return cut[0].stop - cut[0].start, cut[1].stop - cut[1].start


@dataclass(frozen=True)
class Quantiser:
    """Attributes:
    dtype: of the elements.
    order: int64 [channels], the channels in the order in which they are coded.
    means: float32 [channels, 1], in that order.
    step: the quantiser step, a float32 number; 0 codes every channel as its mean.
    """

    dtype: DType
    order: NDArray[np.int64]
    means: NDArray[np.float32]
    step: float

    def symbols(self, matrix: Bits, piece: Cut) -> tuple[Symbols, NDArray[np.int64]]:
        """The symbols of one piece of ``matrix`` [channels, tokens], flat, and the places in them of the elements
        that no symbol can stand for (theirs is 0)."""
        rows, columns = piece
        values = _to_float32(matrix[:, columns].take(self.order[rows], axis=0), self.dtype)
        with np.errstate(all="ignore"):
            if self.step:
                values -= self.means[rows]
                values *= np.float32(1 / self.step)
                np.rint(values, out=values)
            else:
                # A channel without a step is its mean, and what is not crosses exactly.
                values = np.where(values == self.means[rows], np.float32(0), np.float32(np.nan))
            # A NaN makes the comparison false.
            if values.min() >= -RADIUS and values.max() <= RADIUS:
                return values.astype(np.int16).reshape(-1), np.empty(0, dtype=np.int64)
            beyond = ~(np.abs(values) <= RADIUS)
        values[beyond] = 0
        return values.astype(np.int16).reshape(-1), np.flatnonzero(beyond)

    def restore(self, symbols: NDArray[np.int8] | Symbols, matrix: Bits, piece: Cut) -> None:
        """Write the elements that flat ``symbols`` stand for to their places in ``matrix`` [channels, tokens]."""
        rows, columns = piece
        values = symbols.reshape(extent(piece)).astype(np.float32)
        largest = torch.finfo(self.dtype.torch).max
        with np.errstate(all="ignore"):
            values *= np.float32(self.step)
            values += self.means[rows]
            # The step's last half may cross the largest number of the type, which the element itself did not.
            np.clip(values, -largest, largest, out=values)
        matrix[self.order[rows], columns] = _from_float32(values, self.dtype)


def coded_order(ranks: NDArray[np.uint8]) -> NDArray[np.int64]:
    """int64 [channels]: channels of rising ``ranks``, equal ones as they come."""
    return ranks.argsort(kind="stable")


def bits_of(tensor: Tensor) -> Bits:
    """The elements of a contiguous CPU tensor as unsigned integers of their size; its own memory."""
    return tensor.view(_UNSIGNED[tensor.element_size()]).numpy()


def _to_float32(bits: Bits, dtype: DType) -> NDArray[np.float32]:
    """A copy in float32. numpy has no bfloat16: its bits are the upper half of a float32's."""
    if dtype.torch is torch.bfloat16:
        wide = bits.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return bits.view(np.dtype(dtype.name)).astype(np.float32)


def _from_float32(values: NDArray[np.float32], dtype: DType) -> Bits:
    """Rounded to nearest, ties to even; ``values`` are finite in ``dtype`` and may be overwritten."""
    if dtype.torch is torch.bfloat16:
        wide = values.view(np.uint32)
        last = wide >> 16
        last &= 1
        last += 0x7FFF
        wide += last
        wide >>= 16
        return wide.astype(np.uint16)
    return values.astype(np.dtype(dtype.name), copy=False).view(f"u{dtype.itemsize}")
