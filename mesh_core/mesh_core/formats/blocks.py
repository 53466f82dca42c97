"""Scales of blocks of a weight: the tiles in which cuBLAS wants them, and whether their bytes can be scales at all.

A block is some neighbours in a row. Tiles are described at
https://docs.nvidia.com/cuda/cublas/index.html#d-block-scaling-factors-layout: 128 rows by 4 columns of scales each,
and in a tile, row ``32 j + i`` stands at place ``4 i + j``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mesh_core.errors import CheckpointCorrupt

_ROWS, _COLUMNS, _GROUPS = 128, 4, 4


def tiled_shape(rows: int, columns: int) -> tuple[int, int]:
    """Of the tensor that holds [rows, columns] scales in tiles: both are filled up to whole tiles."""
    return -(-rows // _ROWS) * _ROWS, -(-columns // _COLUMNS) * _COLUMNS


def from_tiles(tiles: Tensor, start: int, stop: int, columns: int) -> Tensor:
    """Rows ``start:stop`` of scales, [stop - start, columns] uint8, without what fills up the tiles.

    Args:
        tiles: in `tiled_shape`, of any type of one byte.
    """
    first, last = start // _ROWS, -(-stop // _ROWS)
    across = tiles.shape[1] // _COLUMNS
    bands = tiles.view(torch.uint8).view(-1, across, _ROWS // _GROUPS, _GROUPS, _COLUMNS)[first:last]
    rows = bands.permute(0, 3, 2, 1, 4).reshape(-1, tiles.shape[1])
    return rows[start - first * _ROWS : stop - first * _ROWS, :columns].contiguous()


def to_tiles(scales: Tensor) -> Tensor:
    """The tiles of row-major scales, [rows, columns] of one byte each, filled up with zeros; of the same type."""
    (rows, columns), (tall, wide) = scales.shape, tiled_shape(*scales.shape)
    whole = torch.nn.functional.pad(scales.view(torch.uint8), (0, wide - columns, 0, tall - rows))
    tiles = whole.view(-1, _GROUPS, _ROWS // _GROUPS, wide // _COLUMNS, _COLUMNS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(tall, wide).view(scales.dtype)


def check_block_scales(scales: Tensor, most: int, codes: Tensor, magnitude: int, name: str) -> None:
    """Refuse bytes that are no positive finite scale. Zero may stand where every code of the block is zero.

    Args:
        scales: [rows, blocks] uint8.
        most: the largest byte that is a scale.
        codes: [rows, bytes] of one byte each.
        magnitude: bits of a byte of codes that are not signs.
        name: where the scales lie, for the error.

    Raises:
        CheckpointCorrupt: says which it is.
    """
    if not scales.numel():
        return
    low, high = (int(x) for x in torch.aminmax(scales))
    if high > most:
        raise CheckpointCorrupt(f"{name} has scales that are no positive finite numbers.")
    if low == 0:
        blocks = codes.view(torch.uint8).view(*scales.shape, -1)[scales == 0]
        if bool((blocks & magnitude).any()):
            raise CheckpointCorrupt(f"{name} has a scale of zero for a block of weights that are not zero.")
