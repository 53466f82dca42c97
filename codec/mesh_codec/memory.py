"""Tensors and the memory that they lie in: views both ways, without a copy. Must not know what the bytes mean."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor


def uint8_view(tensor: Tensor) -> Tensor:
    """Flat uint8 over the memory of a contiguous tensor, on its device."""
    # Not `Tensor.view`: a dimension of one element may have any stride, over which torch sees no bytes.
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def bytes_of(tensor: Tensor) -> memoryview:
    """A view of the memory of a contiguous CPU tensor; an empty one for a tensor without elements."""
    return uint8_view(tensor).numpy().data if tensor.numel() else memoryview(b"")


def tensor_over(view: memoryview, dtype: torch.dtype) -> Tensor:
    """A flat tensor over the memory of ``view``, which it keeps alive; copied only where it is misaligned.

    Nobody may write to it: the memory may be read-only. torch warns of that on every process's first such tensor,
    so the memory is handed over by address.
    """
    address: int = np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0]
    memory = (ctypes.c_char * view.nbytes).from_address(address)
    memory.keep = view  # type: ignore[attr-defined]
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    return (flat.clone() if address % dtype.itemsize else flat).view(dtype)
