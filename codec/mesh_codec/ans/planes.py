"""Exact bfloat16 and float16 on a device: the byte with the exponent through a byte coder, the other one as it is.

The sign is moved behind the mantissa, as in `mesh_codec.lossless`: the high byte is then the exponent of a bfloat16,
and the exponent and the first three bits after it of a float16. Mantissas are noise; no coder is asked to try.

Buffers: 0 the high bytes as the byte coder made them, 1 the low bytes. Header: ``dtype``, ``shape``, ``high`` and
``low`` (sums over the bytes, see `mesh_codec.ans.checksum`). Stateless. Tensors of other types, and empty ones, cross
as the portable engine codes them; their header has no ``high``. Must not know which device or coder it works with, nor
the portable bitstream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mesh_codec.ans.coder import LARGEST_SUM, ByteCoder, CoderFactory, check
from mesh_codec.ans.dispatch import checksum
from mesh_codec.ans.stream_coder import StreamCoder, current_device
from mesh_codec.base import DecodeLimits, Decoder, Encoded, Encoder
from mesh_codec.errors import CodecCorrupt
from mesh_codec.lossy import MAX_ELEMENTS
from mesh_codec.memory import tensor_over, uint8_view
from mesh_codec.payload import Form, flat_bytes, form_of, read_form, whole_number


def _carried(form: Form) -> bool:
    """Whether tensors of this form are coded here."""
    return form.dtype.lossy and form.dtype.itemsize == 2 and 0 < form.elements <= MAX_ELEMENTS


class PlanesEncoder(Encoder):
    """``portable`` encodes all else."""

    def __init__(self, factory: CoderFactory, portable: Encoder) -> None:
        self._coder, self._portable = StreamCoder(factory), portable

    def encode(self, tensor: Tensor) -> Encoded:
        form = form_of(tensor)
        if not _carried(form):
            return self._portable.encode(tensor)
        tensor, coder = self._coder.for_encoding(tensor.detach().resolve_neg())
        with current_device(tensor.device):
            return _coded(tensor.contiguous(), form, coder)


def _coded(tensor: Tensor, form: Form, coder: ByteCoder) -> Encoded:
    below, above = _bytes(tensor).unbind(1)
    # Each bit moves up by one, and the highest of all becomes the lowest.
    high = (above << 1) | (below >> 7)
    low = (below << 1) | (above >> 7)
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    checksum(high, sums[:1])
    checksum(low, sums[1:])
    pending = coder.compress(high)
    on_host = [
        torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda).copy_(t, non_blocking=True) for t in (low, sums)
    ]
    # What waits for the coded bytes waits for what was begun before them.
    pending.fetch()
    frame = pending.read()
    high_sum, low_sum = on_host[1].tolist()
    header = form.header() | {"high": high_sum, "low": low_sum}
    return Encoded(header, (frame, on_host[0].numpy().data), on_host)


class PlanesDecoder(Decoder):
    """``portable`` decodes all else."""

    def __init__(self, limits: DecodeLimits, factory: CoderFactory, portable: Decoder) -> None:
        self._limits, self._coder, self._portable = limits, StreamCoder(factory), portable

    def decode(self, encoded: Encoded, device: torch.device | str = "cpu") -> Tensor:
        if "high" not in encoded.header:
            return self._portable.decode(encoded, device)
        form = read_form(encoded.header, self._limits)
        if not _carried(form) or len(encoded.buffers) != 2:
            raise CodecCorrupt(
                f"A payload of {len(encoded.buffers)} buffers announces {form.elements} exponents of {form.dtype.name}."
            )
        place, coder = self._coder.for_decoding(device)
        with current_device(place):
            return _restored(encoded, form, coder, place).view(form.shape).to(device)


def _restored(encoded: Encoded, form: Form, coder: ByteCoder, place: torch.device) -> Tensor:
    frame, below = flat_bytes(encoded.buffers[0], None, "exponents"), encoded.buffers[1]
    totals = [whole_number(encoded.header, name, LARGEST_SUM) for name in ("high", "low")]
    low = tensor_over(flat_bytes(below, form.elements, "mantissas"), torch.uint8).to(place, non_blocking=True)
    high, checks = coder.expand(frame, form.elements)
    result, seen = torch.empty(form.elements, dtype=form.dtype.torch, device=place), checksum(low)
    columns = _bytes(result)
    columns[:, 0] = (low >> 1) | (high << 7)
    columns[:, 1] = (high >> 1) | (low << 7)
    if int(seen) != totals[1]:
        raise CodecCorrupt("The mantissas of a payload are damaged: their sum does not match.")
    check(checks, totals[0])
    return result


def _bytes(tensor: Tensor) -> Tensor:
    """uint8 [elements, 2], the lower byte first; the tensor's own memory."""
    return uint8_view(tensor).view(-1, 2)
