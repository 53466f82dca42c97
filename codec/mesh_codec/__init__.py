"""Tensors to few bytes and back. Knows no sockets and no models."""

from __future__ import annotations

from mesh_codec.base import (
    QUALITIES,
    Buffer,
    Codec,
    CodecChoice,
    DecodeLimits,
    Decoder,
    Encoded,
    Encoder,
    Estimate,
    Quality,
)
from mesh_codec.dtypes import DTYPES, DType, from_name, from_safetensors, from_torch
from mesh_codec.entropy import EntropyCodec
from mesh_codec.errors import CodecCorrupt, CodecError, CodecStateLost, CodecUnsupported
from mesh_codec.hevc.codec import HevcCodec
from mesh_codec.lossless import LosslessCodec
from mesh_codec.raw import RawCodec

__all__ = [
    "DTYPES",
    "QUALITIES",
    "Buffer",
    "Codec",
    "CodecChoice",
    "CodecCorrupt",
    "CodecError",
    "CodecStateLost",
    "CodecUnsupported",
    "DType",
    "DecodeLimits",
    "Decoder",
    "Encoded",
    "Encoder",
    "EntropyCodec",
    "Estimate",
    "HevcCodec",
    "LosslessCodec",
    "Quality",
    "RawCodec",
    "from_name",
    "from_safetensors",
    "from_torch",
]
