"""The one table of element types: names on the wire, names in safetensors files, torch types.

Must not know what the elements are used for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from mesh_codec.errors import CodecUnsupported


@dataclass(frozen=True)
class DType:
    """One element type.

    Attributes:
        name: the name on the wire; numpy's and torch's spelling.
        safetensors: the name in a safetensors header.
        torch: the torch type.
        itemsize: bytes per element.
        lossy: a floating type that may be coded with loss; all others cross exactly.
    """

    name: str
    safetensors: str
    torch: torch.dtype
    itemsize: int
    lossy: bool = False


DTYPES: tuple[DType, ...] = (
    DType("bool", "BOOL", torch.bool, 1),
    DType("uint8", "U8", torch.uint8, 1),
    DType("int8", "I8", torch.int8, 1),
    DType("uint16", "U16", torch.uint16, 2),
    DType("int16", "I16", torch.int16, 2),
    DType("uint32", "U32", torch.uint32, 4),
    DType("int32", "I32", torch.int32, 4),
    DType("uint64", "U64", torch.uint64, 8),
    DType("int64", "I64", torch.int64, 8),
    DType("float8_e4m3fn", "F8_E4M3", torch.float8_e4m3fn, 1),
    DType("float8_e4m3fnuz", "F8_E4M3FNUZ", torch.float8_e4m3fnuz, 1),
    DType("float8_e5m2", "F8_E5M2", torch.float8_e5m2, 1),
    DType("float8_e5m2fnuz", "F8_E5M2FNUZ", torch.float8_e5m2fnuz, 1),
    DType("float16", "F16", torch.float16, 2, lossy=True),
    DType("bfloat16", "BF16", torch.bfloat16, 2, lossy=True),
    DType("float32", "F32", torch.float32, 4, lossy=True),
    DType("float64", "F64", torch.float64, 8),
    DType("complex64", "C64", torch.complex64, 8),
)

_BY_NAME: Mapping[str, DType] = MappingProxyType({d.name: d for d in DTYPES})
_BY_SAFETENSORS: Mapping[str, DType] = MappingProxyType({d.safetensors: d for d in DTYPES})
_BY_TORCH: Mapping[torch.dtype, DType] = MappingProxyType({d.torch: d for d in DTYPES})


def from_name(name: str) -> DType:
    """The type called ``name`` on the wire.

    Raises:
        CodecUnsupported: no such type.
    """
    return _find(_BY_NAME, name, "element type")


def from_safetensors(name: str) -> DType:
    """The type called ``name`` in a safetensors header.

    Raises:
        CodecUnsupported: no such type, or one whose elements are no whole bytes.
    """
    return _find(_BY_SAFETENSORS, name, "safetensors type")


def from_torch(dtype: torch.dtype) -> DType:
    """The entry of a torch type.

    Raises:
        CodecUnsupported: a type that the table does not have.
    """
    found = _BY_TORCH.get(dtype)
    if found is None:
        raise CodecUnsupported(f"No element type for {dtype}.", hint=_known(_BY_NAME))
    return found


def _find(table: Mapping[str, DType], name: object, what: str) -> DType:
    found = table.get(name) if isinstance(name, str) else None
    if found is None:
        raise CodecUnsupported(f"No {what} is called {str(name)[:40]!r}.", hint=_known(table))
    return found


def _known(table: Mapping[str, DType]) -> str:
    return f"one of {', '.join(table)}"
