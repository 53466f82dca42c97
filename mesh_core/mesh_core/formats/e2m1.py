"""Floats of 4 bits (E2M1: one of sign, two of exponent, one of fraction), two in a byte: a table makes them numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from mesh_core.formats.float8 import AT_ONCE

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def pair_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two numbers of every byte, [256]: both of them in one integer, so that one look-up makes both."""
    found = _tables.get((dtype, device))
    if found is None:
        values = torch.tensor(_E2M1, dtype=dtype)
        pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)
        found = pairs.view(torch.int64 if dtype.itemsize == 4 else torch.int32).flatten().to(device)
        _tables[dtype, device] = found
    return found


def unpacked(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of codes [rows, bytes], without scales: [rows, 2 bytes] in ``dtype``, a new tensor.

    The first of two is in the high bits of its byte.
    """
    table = pair_table(dtype, codes.device)
    numbers = torch.empty(codes.numel(), dtype=table.dtype, device=codes.device)
    flat = codes.reshape(-1)
    for start in range(0, flat.numel(), AT_ONCE):
        at = slice(start, start + AT_ONCE)
        torch.index_select(table, 0, flat[at].int(), out=numbers[at])
    return numbers.view(dtype).view(codes.shape[0], 2 * codes.shape[1])


def swapped(codes: Tensor) -> Tensor:
    """The same codes, the two of every byte in each other's place."""
    return (codes << 4) | (codes >> 4)


def temporary(codes: int) -> int:
    """Bytes that `unpacked` needs for the moment, besides its result."""
    return min(codes, AT_ONCE) * 4
