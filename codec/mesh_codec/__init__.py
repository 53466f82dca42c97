"""Tensors to few bytes and back. Knows no sockets and no models.

Importing this package loads nothing; each name is loaded when it is first used, and torch with most of them.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from mesh_codec.base import (
        Buffer,
        Codec,
        CodecChoice,
        DecodeLimits,
        Decoder,
        Encoded,
        Encoder,
        Estimate,
        StreamMemory,
    )
    from mesh_codec.dtypes import DTYPES, DType, from_name, from_safetensors, from_torch
    from mesh_codec.entropy import EntropyCodec
    from mesh_codec.errors import CodecCorrupt, CodecError, CodecStateLost, CodecUnsupported
    from mesh_codec.hevc.codec import HevcCodec
    from mesh_codec.lossless import LosslessCodec
    from mesh_codec.qualities import QUALITIES, Quality, QualityLevel
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
    "QualityLevel",
    "RawCodec",
    "StreamMemory",
    "from_name",
    "from_safetensors",
    "from_torch",
]

_NAMES = {
    "base": (
        "Buffer",
        "Codec",
        "CodecChoice",
        "DecodeLimits",
        "Decoder",
        "Encoded",
        "Encoder",
        "Estimate",
        "StreamMemory",
    ),
    "dtypes": ("DTYPES", "DType", "from_name", "from_safetensors", "from_torch"),
    "entropy": ("EntropyCodec",),
    "errors": ("CodecCorrupt", "CodecError", "CodecStateLost", "CodecUnsupported"),
    "hevc.codec": ("HevcCodec",),
    "lossless": ("LosslessCodec",),
    "qualities": ("QUALITIES", "Quality", "QualityLevel"),
    "raw": ("RawCodec",),
}


def __getattr__(name: str) -> typing.Any:
    for module, names in _NAMES.items():
        if name in names:
            return getattr(importlib.import_module(f"mesh_codec.{module}"), name)
    raise AttributeError(f"module 'mesh_codec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
