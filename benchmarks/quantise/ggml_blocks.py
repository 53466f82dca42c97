"""Numbers as blocks of ggml, of the types that the gguf library reads but does not write.

Each row of scales is fitted to its smallest and largest number: more than enough to test with, and a little worse than
llama.cpp's search for the best ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
"""The numbers that the sixteen codes of IQ4 stand for."""


def _half(values: Floats) -> Bytes:
    """Half-precision numbers [blocks] as bytes [blocks, 2]."""
    return values.astype("<f2")[:, None].view(np.uint8)


def _rounded(values: Floats) -> Floats:
    """As they come out of half precision."""
    return values.astype(np.float16).astype(np.float32)


def _over(values: Floats, by: Floats) -> Floats:
    """Their quotient; 0 where ``by`` is."""
    return np.divide(values, by, out=np.zeros(np.broadcast_shapes(values.shape, by.shape), np.float32), where=by != 0)


def _codes(values: Floats, least: int, most: int) -> NDArray[np.int32]:
    return np.clip(np.rint(values), least, most).astype(np.int32)


def _packed(values: NDArray[np.int32], bits: int, axis: int) -> Bytes:
    """Numbers of ``bits`` along an axis in one byte, the first one lowest."""
    places = np.arange(values.shape[axis]) * bits
    shape = [1] * values.ndim
    shape[axis] = -1
    return np.asarray((values << places.reshape(shape)).sum(axis)).astype(np.uint8)


def _with_minimum(
    x: Floats, rows: int, most: int, most_scale: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], Floats, Floats]:
    """``x`` [blocks, 256] as ``d scale q - dmin min``: q [blocks, rows, ...], scale, min [blocks, rows], d and dmin."""
    parts = x.reshape(len(x), rows, -1)
    low = np.minimum(parts.min(2), 0)
    scale, minimum = (parts.max(2) - low).clip(0) / most, -low
    d, dmin = _rounded(scale.max(1) / most_scale), _rounded(minimum.max(1) / most_scale)
    scales, minima = (_codes(_over(s, by[:, None]), 0, most_scale) for s, by in ((scale, d), (minimum, dmin)))
    step, below = (d[:, None] * scales)[:, :, None], (dmin[:, None] * minima)[:, :, None]
    return _codes(_over(parts + below, step.astype(np.float32)), 0, most), scales, minima, d, dmin


def _around_zero(
    x: Floats, rows: int, least: int, most_scale: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], Floats]:
    """``x`` [blocks, 256] as ``d scale q``: q from ``least`` to ``-least - 1``, scale from ``-most_scale`` on."""
    parts = x.reshape(len(x), rows, -1)
    farthest = np.take_along_axis(parts, np.abs(parts).argmax(2)[:, :, None], 2)[:, :, 0]
    scale = farthest / least
    d = _rounded(np.abs(scale).max(1) / most_scale)
    scales = _codes(_over(scale, d[:, None]), -most_scale, most_scale)
    return _codes(_over(parts, (d[:, None] * scales)[:, :, None]), least, -least - 1), scales, d


def _six_bits(scales: NDArray[np.int32], minima: NDArray[np.int32]) -> Bytes:
    """Eight of each in twelve bytes."""
    first, last = (scales[:, :4], minima[:, :4]), (scales[:, 4:], minima[:, 4:])
    high = [one | (other >> 4) << 6 for one, other in zip(first, last, strict=True)]
    return np.concatenate([*high, last[0] & 15 | (last[1] & 15) << 4], 1).astype(np.uint8)


def _q2_k(x: Floats) -> Bytes:
    q, scales, minima, d, dmin = _with_minimum(x, 16, 3, 15)
    packed = _packed(q.reshape(-1, 2, 4, 32), 2, 2).reshape(-1, 64)
    return np.concatenate([(scales | minima << 4).astype(np.uint8), packed, _half(d), _half(dmin)], 1)


def _q3_k(x: Floats) -> Bytes:
    q, scales, d = _around_zero(x, 16, -4, 31)
    q, scales = q + 4, scales + 32
    high = _packed((q >> 2).reshape(-1, 8, 32), 1, 1)
    low = _packed((q & 3).reshape(-1, 2, 4, 32), 2, 2).reshape(-1, 64)
    packed = [_packed((scales & 15).reshape(-1, 2, 8), 4, 1), _packed((scales >> 4).reshape(-1, 4, 4), 2, 1)]
    return np.concatenate([high, low, *packed, _half(d)], 1)


def _q4_k(x: Floats) -> Bytes:
    q, scales, minima, d, dmin = _with_minimum(x, 8, 15, 63)
    packed = _packed(q.reshape(-1, 4, 2, 32), 4, 2).reshape(-1, 128)
    return np.concatenate([_half(d), _half(dmin), _six_bits(scales, minima), packed], 1)


def _q5_k(x: Floats) -> Bytes:
    q, scales, minima, d, dmin = _with_minimum(x, 8, 31, 63)
    high, low = _packed(q >> 4, 1, 1), _packed((q & 15).reshape(-1, 4, 2, 32), 4, 2).reshape(-1, 128)
    return np.concatenate([_half(d), _half(dmin), _six_bits(scales, minima), high, low], 1)


def _q6_k(x: Floats) -> Bytes:
    q, scales, d = _around_zero(x, 16, -32, 127)
    q = q + 32
    low = _packed((q & 15).reshape(-1, 2, 2, 64), 4, 2).reshape(-1, 128)
    high = _packed((q >> 4).reshape(-1, 2, 4, 32), 2, 2).reshape(-1, 64)
    return np.concatenate([low, high, scales.astype(np.int8).view(np.uint8), _half(d)], 1)


def _nearest(x: Floats) -> NDArray[np.int32]:
    """The codes of IQ4 that come nearest."""
    return np.searchsorted((_IQ4[1:] + _IQ4[:-1]) / 2, x).astype(np.int32)


def _iq4_nl(x: Floats) -> Bytes:
    d = _rounded(np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)[:, 0] / -127)
    return np.concatenate([_half(d), _packed(_nearest(_over(x, d[:, None])).reshape(-1, 2, 16), 4, 1)], 1)


def _iq4_xs(x: Floats) -> Bytes:
    _, scales, d = _around_zero(x, 8, -127, 31)
    codes = _nearest(_over(x.reshape(-1, 8, 32), (d[:, None] * scales)[:, :, None]))
    scales = scales + 32
    high = (scales >> 4 << np.arange(8) * 2).sum(1).astype("<u2")[:, None].view(np.uint8)
    low = _packed((scales & 15).reshape(-1, 4, 2), 4, 2)
    return np.concatenate([_half(d), high, low, _packed(codes.reshape(-1, 8, 2, 16), 4, 2).reshape(-1, 128)], 1)


BLOCKS: Mapping[str, tuple[int, Callable[[Floats], Bytes]]] = {
    "Q2_K": (256, _q2_k),
    "Q3_K": (256, _q3_k),
    "Q4_K": (256, _q4_k),
    "Q5_K": (256, _q5_k),
    "Q6_K": (256, _q6_k),
    "IQ4_NL": (32, _iq4_nl),
    "IQ4_XS": (256, _iq4_xs),
}
"""By type: numbers in a block, and the blocks [blocks, bytes] of numbers [blocks, numbers]."""
