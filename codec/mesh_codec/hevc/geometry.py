"""How the channels of a tensor lie in 4:4:4 video frames. Both ends derive it from the shape and the settings.

Each channel (or part of a long one) becomes a small image; images are laid out as a mosaic on the three planes of a
frame, which costs nothing, since 4:4:4 codes the planes at equal size. Channels are shared among strips, streams of
their own that several engines or cores work on side by side. Must not know what a pixel means.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from mesh_codec.quantiser import Grid

LONGEST_SIDE = 4096
"""Of a frame, in pixels: every HEVC decoder in hardware takes 4096 x 4096 or more."""

SHORTEST_SIDE = 144
"""NVDEC takes no smaller HEVC frames."""

_ALIGN = 16
"""Sides are whole multiples: no engine has to crop, and coding blocks of 16 fit."""

_LONGEST_PART = 1 << 20
"""Tokens in one image; longer channels are cut in parts."""

_STRIP_ELEMENTS = 1 << 19
"""Elements that are worth a stream of their own."""


@dataclass(frozen=True)
class Geometry:
    """Attributes:
    channels, tokens: of the tensor.
    parts: images that one channel makes.
    image: rows and columns of pixels of one image; the last ones may be padding.
    mosaic: rows and columns of images on a plane.
    frames: per strip.
    strips: streams.
    bits: of a pixel, 8 or 10.
    """

    channels: int
    tokens: int
    parts: int
    image: tuple[int, int]
    mosaic: tuple[int, int]
    frames: int
    strips: int
    bits: int

    @classmethod
    def of(cls, grid: Grid, *, bits: int, tile: int = 0, strips: int = 1) -> Geometry:
        """``tile`` x ``tile`` images on a plane, fewer where they do not fit or are not there; 0 for as many as fit,
        so that a tensor is one frame of each strip where possible."""
        parts = -(-grid.tokens // _LONGEST_PART)
        high, wide = _near_square(-(-grid.tokens // parts))
        images = grid.channels * parts
        strips = max(1, min(strips, images, grid.channels * grid.tokens // _STRIP_ELEMENTS))
        on_plane = -(-images // (3 * strips))
        # Fewer would leave most of the smallest frame empty.
        rows, columns = (min(max(tile, SHORTEST_SIDE // side), LONGEST_SIDE // side) for side in (high, wide))
        if not tile or rows * columns > on_plane:
            columns = min(-(-_root(on_plane * high * wide) // wide), on_plane, LONGEST_SIDE // wide)
            rows = min(-(-on_plane // columns), LONGEST_SIDE // high)
        frames = -(-on_plane // (rows * columns))
        return cls(grid.channels, grid.tokens, parts, (high, wide), (rows, columns), frames, strips, bits)

    @property
    def height(self) -> int:
        """Of a frame, in pixels."""
        return _side(self.mosaic[0] * self.image[0])

    @property
    def width(self) -> int:
        """Of a frame, in pixels."""
        return _side(self.mosaic[1] * self.image[1])

    @property
    def middle(self) -> int:
        """The pixel that stands for 0."""
        return 1 << (self.bits - 1)

    @property
    def dtype(self) -> torch.dtype:
        """Of pixels: uint8, or int16 (which torch computes with, unlike uint16) for 10 bits."""
        return torch.uint8 if self.bits == 8 else torch.int16

    def pack(self, pixels: Tensor) -> Tensor:
        """``pixels`` [channels, tokens] -> [strips, frames, 3, height, width]."""
        high, wide = self.image
        rows, columns = self.mosaic
        part = -(-self.tokens // self.parts)
        padded = _padded(pixels, self.channels, part * self.parts, self.middle)
        places = self.strips * self.frames * 3 * rows * columns
        images = _padded(padded.reshape(self.channels * self.parts, part), places, high * wide, self.middle)
        shape = (self.strips, self.frames, 3, self.height, self.width)
        planes = torch.full(shape, self.middle, dtype=self.dtype, device=pixels.device)
        mosaic = images.view(self.strips, self.frames, 3, rows, columns, high, wide)
        self._images(planes).copy_(mosaic)
        return planes

    def unpack(self, planes: Tensor) -> Tensor:
        """The inverse of `pack`."""
        part = -(-self.tokens // self.parts)
        images = self._images(planes).reshape(-1, self.image[0] * self.image[1])
        used = images[: self.channels * self.parts, :part]
        return used.reshape(self.channels, part * self.parts)[:, : self.tokens]

    def _images(self, planes: Tensor) -> Tensor:
        """A view of ``planes`` as [strips, frames, 3, rows, columns, high, wide]."""
        (high, wide), (rows, columns) = self.image, self.mosaic
        used = planes[..., : rows * high, : columns * wide]
        return used.view(self.strips, self.frames, 3, rows, high, columns, wide).transpose(4, 5)


def _near_square(tokens: int) -> tuple[int, int]:
    """Rows and columns of at least ``tokens`` pixels: without padding where a divisor makes them at most 2 to 1."""
    side = isqrt(tokens)
    for rows in range(side, max(1, side * 7 // 10) - 1, -1):
        if tokens % rows == 0:
            return rows, tokens // rows
    columns = _root(tokens)
    return -(-tokens // columns), columns


def _root(number: int) -> int:
    """The square root, rounded up."""
    return isqrt(number - 1) + 1 if number else 0


def _side(pixels: int) -> int:
    return max(SHORTEST_SIDE, -(-pixels // _ALIGN) * _ALIGN)


def _padded(matrix: Tensor, rows: int, columns: int, value: int) -> Tensor:
    if matrix.shape == (rows, columns):
        return matrix
    padded = matrix.new_full((rows, columns), value)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded
