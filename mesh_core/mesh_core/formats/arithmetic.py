"""Names of arithmetics that end in the type that numbers are made in: ``WAY/TYPE``, ``kitchen/fp8-dequant/bf16``.

Where a weight is asked for in another type, its numbers are made in the named one first and then converted, so that
the name says what the bits are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from mesh_core.model.stored import WeightFormat, refuse_arithmetic

_TYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in _TYPES.items()}


def in_type(ways: Iterable[str], dtype: torch.dtype) -> tuple[str, ...]:
    """The names of ``ways`` in a type; none if it is not one that is computed in."""
    return tuple(f"{way}/{_NAMES[dtype]}" for way in ways) if dtype in _NAMES else ()


def way_and_type(
    format: WeightFormat, kind: str, arithmetic: str, ways: Iterable[str], dtype: torch.dtype, device: torch.device
) -> tuple[str, torch.dtype]:
    """What a name says.

    Args:
        ways: that the format has on any device.
        dtype, device: for the error alone.

    Raises:
        CheckpointUnrecognised: not a name of these.
    """
    way, _, suffix = arithmetic.rpartition("/")
    if way not in ways or suffix not in _TYPES:
        raise refuse_arithmetic(format, kind, arithmetic, format.arithmetics(kind, dtype, device))
    return way, _TYPES[suffix]
