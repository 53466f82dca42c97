"""The exact codec: a tensor's own bytes, in row-major order. Any element type of the table, any shape.

Must not know what the bytes are worth: no coding, no statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mesh_codec.base import Codec, DecodeLimits, Decoder, Encoded, Encoder, Estimate, Quality
from mesh_codec.errors import CodecCorrupt, CodecUnsupported
from mesh_codec.memory import bytes_of, tensor_over
from mesh_codec.payload import buffers_of, flat_bytes, form_of, read_form
from mesh_codec.qualities import find


class RawCodec(Codec):
    """Exact, whatever the quality. Its streams hold no state; it has no settings."""

    name: ClassVar[str] = "raw"

    def capabilities(self) -> dict[str, Any]:
        return {}

    def settings(self, quality: Quality, peer: Mapping[str, Any]) -> dict[str, Any]:
        find(quality)
        return {}

    def estimate(self, settings: Mapping[str, Any], dtype: torch.dtype) -> Estimate:
        return Estimate(bits=8.0 * dtype.itemsize)

    def encoder(self, settings: Mapping[str, Any]) -> RawEncoder:
        _no_settings(settings)
        return RawEncoder()

    def decoder(self, settings: Mapping[str, Any], limits: DecodeLimits = DecodeLimits()) -> RawDecoder:  # noqa: B008
        _no_settings(settings)
        return RawDecoder(limits)


class RawEncoder(Encoder):
    """Buffers are views of the tensor's memory where it is contiguous on the CPU, of a copy elsewhere."""

    def encode(self, tensor: Tensor) -> Encoded:
        form = form_of(tensor)
        header = form.header()
        if not form.elements:
            return Encoded(header, ())
        owner = _on_host(tensor.detach().resolve_conj().resolve_neg().contiguous())
        return Encoded(header, (bytes_of(owner),), owner)


class RawDecoder(Decoder):
    """Tensors on the CPU are views of the buffer's memory: read them, do not write to them."""

    def __init__(self, limits: DecodeLimits) -> None:
        self._limits = limits

    def decode(self, encoded: Encoded, device: torch.device | str = "cpu") -> Tensor:
        form = read_form(encoded.header, self._limits)
        buffers = buffers_of(encoded, form, 1)
        if not buffers:
            return form.empty(device)
        view = flat_bytes(buffers[0], form.nbytes, "raw")
        # Any other byte in a bool is undefined behaviour in the kernels that read it.
        if form.dtype.torch is torch.bool and np.frombuffer(view, dtype=np.uint8).max() > 1:
            raise CodecCorrupt("A raw bool tensor holds bytes that are neither 0 nor 1.")
        return tensor_over(view, form.dtype.torch).reshape(form.shape).to(device)


def _on_host(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor)
    return host


def _no_settings(settings: Mapping[str, Any]) -> None:
    if settings:
        raise CodecUnsupported(f"The raw codec has no settings, got {', '.join(map(str, settings))}.")
