"""Checks and memory views that all codecs share: headers against limits, buffers against tensors.

Must not know any format: what the bytes of a buffer mean is the codec's affair.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mesh_codec.base import Buffer, DecodeLimits
from mesh_codec.dtypes import DType, from_name, from_torch
from mesh_codec.errors import CodecCorrupt, CodecUnsupported


@dataclass(frozen=True)
class Form:
    """What a tensor looks like: element type and shape."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize

    def header(self) -> dict[str, Any]:
        """The entries that every header has."""
        return {"dtype": self.dtype.name, "shape": list(self.shape)}


def form_of(tensor: Tensor) -> Form:
    """The form of a dense tensor that holds data.

    Raises:
        CodecUnsupported: a sparse, quantised or meta tensor, or an element type outside the table.
    """
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise CodecUnsupported(
            f"Cannot code a tensor of layout {tensor.layout} on {tensor.device}.", hint="tensor.to_dense()"
        )
    return Form(from_torch(tensor.dtype), tuple(tensor.shape))


def read_form(header: Mapping[str, Any], limits: DecodeLimits) -> Form:
    """The form that ``header`` announces, within ``limits``.

    Raises:
        CodecCorrupt: it is missing, no form at all, or over a limit.
    """
    if not isinstance(header, Mapping):
        raise CodecCorrupt(f"A payload's header is a {type(header).__name__}, not a map.")
    shape = header.get("shape")
    if not isinstance(shape, list | tuple) or len(shape) > limits.max_dims:
        raise CodecCorrupt(f"A payload's shape is no list of at most {limits.max_dims} sizes.")
    if any(type(n) is not int or not 0 <= n < 1 << 63 for n in shape):
        raise CodecCorrupt(f"A payload's shape holds something that is no size: {str(shape)[:80]}.")
    try:
        dtype = from_name(header.get("dtype", ""))
    except CodecUnsupported as error:
        raise CodecCorrupt(f"A payload's header is damaged: {error.message}") from error
    form = Form(dtype, tuple(shape))
    # Without the zeros, or [0, 2**60] would pass as empty and overflow torch's strides.
    largest = prod(n for n in form.shape if n)
    if largest > limits.max_elements or largest * dtype.itemsize > limits.max_bytes:
        raise CodecCorrupt(
            f"A payload announces {list(shape)} of {dtype.name}, over the limit of {limits.max_elements} elements "
            f"or {limits.max_bytes} bytes."
        )
    return form


def whole_number(header: Mapping[str, Any], key: str, largest: int) -> int:
    """``header[key]``, an int from 0 to ``largest``.

    Raises:
        CodecCorrupt: it is anything else.
    """
    value = header.get(key)
    if type(value) is not int or not 0 <= value <= largest:
        raise CodecCorrupt(f"A payload's {key!r} is {str(value)[:40]}, not a whole number from 0 to {largest}.")
    return value


def flat_bytes(buffer: Buffer, nbytes: int | None, what: str) -> memoryview:
    """``buffer`` as a flat view of bytes: ``nbytes`` of them, unless None.

    Raises:
        CodecCorrupt: it is no contiguous buffer of that size.
    """
    try:
        view = memoryview(buffer).cast("B")
    except (TypeError, ValueError) as error:
        raise CodecCorrupt(f"The {what} buffer is no contiguous memory.") from error
    if nbytes is not None and view.nbytes != nbytes:
        raise CodecCorrupt(f"The {what} buffer has {view.nbytes} bytes where {nbytes} belong.")
    return view


def byte_view(tensor: Tensor) -> Tensor:
    """Flat uint8 over the memory of a contiguous tensor."""
    # Not `Tensor.view`: it keeps odd strides of dimensions of one element, over which bytes cannot be seen.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def bytes_of(tensor: Tensor) -> memoryview:
    """A view of the memory of a contiguous CPU tensor of at least one element."""
    return byte_view(tensor).numpy().data


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
