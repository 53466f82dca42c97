"""Elements that cross exactly beside the quantised ones: positions and values to one buffer and back.

Must not know why an element is an outlier.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mesh_codec.errors import CodecCorrupt
from mesh_codec.payload import flat_bytes
from mesh_codec.symbols import expand, squeeze


@dataclass(frozen=True)
class Outliers:
    """Attributes:
    positions: int64 [n], ascending, in the row-major tensor.
    values: unsigned integers [n] of the element's size: its bits.
    """

    positions: NDArray[np.int64]
    values: NDArray[np.unsignedinteger]

    def to_bytes(self) -> bytes:
        """One zstandard frame of byte planes: those of the gaps (uint32), then those of the values, least
        significant first; b"" when there are none."""
        if not len(self.positions):
            return b""
        gaps = self.positions.copy()
        gaps[1:] -= self.positions[:-1]
        return squeeze(np.concatenate([_planes(gaps.astype("<u4")), _planes(self.values)]))


def read_outliers(frame: memoryview, count: int, itemsize: int, elements: int) -> Outliers:
    """The inverse of `Outliers.to_bytes` for ``count`` elements of ``itemsize`` bytes in a tensor of ``elements``.

    Raises:
        CodecCorrupt: damaged, or positions that are not ascending or lie outside the tensor.
    """
    kind = np.dtype(f"<u{itemsize}")
    if not count:
        flat_bytes(frame, 0, "outliers")
        return Outliers(np.empty(0, np.int64), np.empty(0, kind))
    data = expand(frame, count * (4 + itemsize), "outliers")
    gaps = _from_planes(data[: 4 * count], np.dtype("<u4"))
    positions = np.cumsum(gaps, dtype=np.int64)
    if positions[-1] >= elements or not gaps[1:].all():
        raise CodecCorrupt("The outliers of a payload are not in order or lie outside the tensor.")
    return Outliers(positions, _from_planes(data[4 * count :], kind))


def _planes(numbers: NDArray[np.unsignedinteger]) -> NDArray[np.uint8]:
    little = numbers.astype(numbers.dtype.newbyteorder("<"), copy=False).view(np.uint8).reshape(len(numbers), -1)
    planes = np.empty(little.T.shape, np.uint8)
    # Plane by plane: numpy's transposition of narrow arrays takes several times as long.
    for plane, column in zip(planes, little.T, strict=True):
        plane[:] = column
    return planes.reshape(-1)


def _from_planes(planes: NDArray[np.uint8], dtype: np.dtype[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    numbers = np.empty(len(planes) // dtype.itemsize, dtype)
    for column, plane in zip(
        numbers.view(np.uint8).reshape(len(numbers), -1).T, planes.reshape(dtype.itemsize, -1), strict=True
    ):
        column[:] = plane
    return numbers
