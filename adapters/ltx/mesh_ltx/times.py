"""Timesteps in compact form: the distinct values, which change with every step, and who has which, which does not.

An image to video run gives each of thousands of video tokens its own timestep, but only a few values differ. The
values cross as state, the indices as constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

SUFFIX = "_at"
"""``timestep_at`` holds, for each element of ``timestep``, the index of its value."""

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def compact(times: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], dict[str, str]]:
    """Distinct values of all ``times`` together [U]; their indices by name, flat; types that are not the values' own.

    Values are told apart by their bits, so that `spread` gives back what was there.
    """
    common = reduce(torch.promote_types, (t.dtype for t in times.values()))
    flat = torch.cat([t.reshape(-1).to(common) for t in times.values()])
    bits = flat.view(_BITS[flat.element_size()]) if flat.is_floating_point() else flat
    distinct, index = torch.unique(bits, return_inverse=True)
    index = index.to(torch.uint8 if len(distinct) <= 256 else torch.int32)
    parts = index.split([t.numel() for t in times.values()])
    types = {name: str(t.dtype).removeprefix("torch.") for name, t in times.items() if t.dtype != common}
    return distinct.view(common), {f"{n}{SUFFIX}": p for n, p in zip(times, parts, strict=True)}, types


def spread(values: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """One of the times that `compact` took, flattened."""
    return values[index.long()].to(dtype)
