"""Outliers of tensors on any device: taken from them by position, and written back. Must not know why they are such."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesh_codec.outliers import Outliers
from mesh_codec.quantiser import bits_of

_SIGNED: Mapping[int, torch.dtype] = MappingProxyType({2: torch.int16, 4: torch.int32})
"""torch indexes these on every device, unlike the unsigned types."""


def outliers_at(flat: Tensor, places: Tensor) -> Outliers:
    """The elements of ``flat`` [n] at the ascending ``places``, int64."""
    return Outliers(places.cpu().numpy(), bits_of(flat[places].cpu()))


def as_integers(tensor: Tensor) -> Tensor:
    """The bits of the elements, as integers of their size."""
    return tensor.view(_SIGNED[tensor.element_size()])


def bits_at(flat: Tensor, places: Tensor) -> Tensor:
    """The bits of the elements of ``flat`` [n] at ``places``, int64, as integers of their size; waits for no device."""
    return as_integers(flat)[places]


def outliers_of(listed: NDArray[np.int64], itemsize: int) -> Outliers:
    """From entries in any order, each a place in the upper half and the bits of an element of ``itemsize`` bytes in the
    lower."""
    ordered = np.sort(listed)
    return Outliers(ordered >> 32, ordered.astype(f"<u{itemsize}"))


def listed(outliers: Outliers, device: torch.device) -> Tensor:
    """int64 [n] on ``device``: places in the upper half, bits of the elements in the lower. Waits for no device."""
    there = torch.from_numpy((outliers.positions << 32) | outliers.values.astype(np.int64))
    return there.to(device, non_blocking=True)


def write_outliers(tensor: Tensor, outliers: Outliers) -> Tensor:
    """``tensor``, contiguous, with ``outliers`` written into it; waits for no device."""
    return write_listed(tensor, listed(outliers, tensor.device)) if len(outliers.positions) else tensor


def write_listed(tensor: Tensor, there: Tensor) -> Tensor:
    """``tensor``, contiguous, with what `listed` gave written into it."""
    elements = as_integers(tensor).view(-1)
    elements[there >> 32] = there.to(elements.dtype)
    return tensor
