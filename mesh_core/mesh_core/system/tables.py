"""Tables for people: cells of whatever origin, made visible and aligned."""

from __future__ import annotations

from collections.abc import Sequence

from mesh_core.visible import visible

WIDEST = 60
"""Characters of a cell that are shown; names of other machines' things may be longer than a screen is wide."""


def aligned(rows: Sequence[Sequence[object]], left: int = 0, widest: int = WIDEST) -> list[str]:
    """Lines of cells, each column as wide as its widest cell; the first ``left`` are set to the left."""
    cells = [[visible(cell, widest) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(_set(row, widths, left)).rstrip() for row in cells]


def _set(row: Sequence[str], widths: Sequence[int], left: int) -> list[str]:
    pairs = enumerate(zip(row, widths, strict=True))
    return [cell.ljust(width) if column < left else cell.rjust(width) for column, (cell, width) in pairs]
