"""Checks that all codecs share: headers against limits, buffers against what the header announces.

Must not know any format: what the bytes of a buffer mean is the codec's affair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from mesh_codec.base import Buffer, DecodeLimits, Encoded
from mesh_codec.dtypes import DType, from_name, from_torch
from mesh_codec.errors import CodecCorrupt, CodecUnsupported


@dataclass(frozen=True)
class Form:
    """What a tensor looks like: element type and shape."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Of the whole tensor; 1 where there are no dimensions."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of the tensor's memory, uncoded."""
        return self.elements * self.dtype.itemsize

    def header(self) -> dict[str, Any]:
        """The entries that every header has."""
        return {"dtype": self.dtype.name, "shape": list(self.shape)}

    def empty(self, device: torch.device | str = "cpu") -> Tensor:
        """A contiguous tensor that looks like this; what it holds is not defined."""
        return torch.empty(self.shape, dtype=self.dtype.torch, device=device)


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


def positive_number(header: Mapping[str, Any], key: str) -> float:
    """``header[key]``, a float32 number from 0.

    Raises:
        CodecCorrupt: it is anything else.
    """
    value = header.get(key)
    if type(value) is not float or not 0 <= value <= 3.4028234663852886e38:
        raise CodecCorrupt(f"A payload's {key!r} is {str(value)[:40]}, not a float32 number from 0.")
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


def buffers_of(encoded: Encoded, form: Form, count: int) -> tuple[memoryview, ...]:
    """The ``count`` buffers of a payload as flat bytes; a tensor without elements has none.

    Raises:
        CodecCorrupt: there are more or fewer, or one is no contiguous memory.
    """
    expected = count if form.elements else 0
    if len(encoded.buffers) != expected:
        raise CodecCorrupt(f"A payload came in {len(encoded.buffers)} buffers where {expected} belong.")
    return tuple(flat_bytes(buffer, None, "payload") for buffer in encoded.buffers)


def crc_of(buffers: Sequence[Buffer]) -> int:
    """CRC-32 of ``buffers`` one after the other."""
    value = 0
    for buffer in buffers:
        value = crc32(buffer, value)
    return value
