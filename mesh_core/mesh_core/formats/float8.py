"""What formats of 8-bit floats share: which codes are numbers, what a scale may be, and which cards multiply them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from mesh_core.errors import CheckpointCorrupt
from mesh_core.model.stored import Parts, StoredTensor

E4M3 = "F8_E4M3"
E5M2 = "F8_E5M2"

TYPES: Mapping[str, torch.dtype] = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
"""By the name in safetensors files."""

E4M3_MAX = 448.0

AT_ONCE = 1 << 24
"""Numbers that are made by way of float32 at a time."""

_FIRST_NOT_FINITE: Mapping[torch.dtype, int] = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
"""Codes without their sign from there on are NaN or infinite."""


def checked_codes(stored: StoredTensor, codes: Tensor) -> Tensor:
    """``codes``, contiguous.

    Raises:
        CheckpointCorrupt: some are no finite numbers.
    """
    codes = codes.contiguous()
    first = _FIRST_NOT_FINITE[codes.dtype]
    # Two passes without copies: such codes are the largest as unsigned bytes, or without their sign as signed ones.
    largest = [int(codes.view(as_type).max()) for as_type in (torch.int8, torch.uint8) if codes.numel()]
    if largest and (largest[0] >= first or largest[1] >= first | 0x80):
        raise CheckpointCorrupt(f"{stored.parts['codes'].name} has codes that are no finite numbers.")
    return codes


def checked_scales(stored: StoredTensor, role: str, scales: Tensor, count: int) -> Tensor:
    """``scales`` as F32 [count], contiguous.

    Raises:
        CheckpointCorrupt: another number of them, or some are no positive finite numbers.
    """
    name = stored.parts[role].name
    if scales.dtype != torch.float32 or scales.numel() != count:
        raise CheckpointCorrupt(f"{name} does not hold {count} scales in float32.")
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise CheckpointCorrupt(f"{name} has scales that are no positive finite numbers.")
    return scales.reshape(count).contiguous()


def in_float32(parts: Parts, dtype: torch.dtype) -> Tensor:
    """The products of ``codes`` [rows, columns] and ``scale`` [rows or 1], rounded once.

    No more than `AT_ONCE` of them are in float32 at a time, or one row.
    """
    codes, scales = parts["codes"], parts["scale"]
    made = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    rows = max(1, AT_ONCE // max(1, codes.shape[1]))
    for start in range(0, codes.shape[0], rows):
        some = slice(start, start + rows)
        factors = scales[some] if len(scales) > 1 else scales
        made[some] = codes[some].to(torch.float32).mul_(factors[:, None])
    return made


def transient(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes that `in_float32` takes at most, its result included, for two dimensions."""
    rows, columns = shape
    at_once = min(rows * columns, max(AT_ONCE, columns))
    return rows * columns * dtype.itemsize + at_once * torch.float32.itemsize


@cache
def multiplies(device: torch.device) -> bool:
    """Whether a device multiplies 8-bit floats."""
    return device.type == "cuda" and torch.version.cuda is not None and _capability(device) >= (8, 9)


_capability: Callable[[torch.device], tuple[int, int]] = torch.cuda.get_device_capability
