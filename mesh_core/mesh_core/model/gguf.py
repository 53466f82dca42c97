"""A GGUF file: which tensors it holds and where, as a safetensors file's header would say it.

The format is specified at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Quantised tensors get a type of
the form ``GGUF:Q4_K``; a type that has no entry in the table below gets its number, ``GGUF:99``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from mesh_core.errors import CheckpointCorrupt, CheckpointError, CheckpointUnrecognised
from mesh_core.model.gguf_values import MAGIC, Cursor, Value
from mesh_core.model.safetensors import MAX_HEADER_BYTES, FileHeader, opened
from mesh_core.model.stored import TensorInfo
from mesh_core.system.file_stamp import FileStamp

DTYPE_PREFIX = "GGUF:"
"""Before the name of a quantised type, where the name of an element type stands for plain tensors."""

_VERSIONS = (2, 3)

_MOST_DIMENSIONS = 4

_MOST_ALIGNMENT = 1 << 20
"""Files have 32."""

_MOST_NAMES = 100_000
"""Of tensors, and of entries before them."""

_LONGEST_NAME = 4096
"""Of bytes in a tensor's name; ggml's own limit is 64."""

_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Before the name of a tensor that ComfyUI's converters brought into rows of whole blocks: its own shape."""


class GgufType(NamedTuple):
    """A type of tensors: ``block_bytes`` hold ``block_size`` numbers of one row."""

    number: int
    name: str
    block_size: int
    block_bytes: int


_PLAIN = {
    t.number: t
    for t in (
        GgufType(0, "F32", 1, 4),
        GgufType(1, "F16", 1, 2),
        GgufType(24, "I8", 1, 1),
        GgufType(25, "I16", 1, 2),
        GgufType(26, "I32", 1, 4),
        GgufType(27, "I64", 1, 8),
        GgufType(28, "F64", 1, 8),
        GgufType(30, "BF16", 1, 2),
    )
}
"""By number, those whose elements safetensors has under the same name."""

QUANTISED: Mapping[int, GgufType] = {
    t.number: t
    for t in (
        GgufType(2, "Q4_0", 32, 18),
        GgufType(3, "Q4_1", 32, 20),
        GgufType(6, "Q5_0", 32, 22),
        GgufType(7, "Q5_1", 32, 24),
        GgufType(8, "Q8_0", 32, 34),
        GgufType(9, "Q8_1", 32, 40),
        GgufType(10, "Q2_K", 256, 84),
        GgufType(11, "Q3_K", 256, 110),
        GgufType(12, "Q4_K", 256, 144),
        GgufType(13, "Q5_K", 256, 176),
        GgufType(14, "Q6_K", 256, 210),
        GgufType(15, "Q8_K", 256, 292),
        GgufType(16, "IQ2_XXS", 256, 66),
        GgufType(17, "IQ2_XS", 256, 74),
        GgufType(18, "IQ3_XXS", 256, 98),
        GgufType(19, "IQ1_S", 256, 50),
        GgufType(20, "IQ4_NL", 32, 18),
        GgufType(21, "IQ3_S", 256, 110),
        GgufType(22, "IQ2_S", 256, 82),
        GgufType(23, "IQ4_XS", 256, 136),
        GgufType(29, "IQ1_M", 256, 56),
        GgufType(34, "TQ1_0", 256, 54),
        GgufType(35, "TQ2_0", 256, 66),
        GgufType(39, "MXFP4", 32, 17),
        GgufType(40, "NVFP4", 64, 36),
        GgufType(41, "Q1_0", 128, 18),
    )
}
"""By number, those that pack several numbers of a row into blocks."""


@dataclass(frozen=True)
class _Entry:
    """What a header says of one tensor. ``shape`` as torch has it, rows first; ``offset`` from the data's start."""

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int


def read_gguf_header(file: Path, most: int = MAX_HEADER_BYTES) -> FileHeader:
    """The header of a file. Reads no tensor data, and trusts nothing that it reads. The metadata is its texts and whole
    numbers; lists are left out.

    Args:
        most: bytes of a header that is parsed.

    Raises:
        CheckpointUnrecognised: not a GGUF file, of another version or byte order, one part of several, or one with a
            header over the limit.
        CheckpointCorrupt: truncated, or a header that contradicts itself or the file.
        CheckpointChanged: the file is being written to.
        CheckpointError: the file cannot be read.
    """
    try:
        stamp = FileStamp.at(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
    with opened(file, stamp) as stream:
        cursor = Cursor(stream, file, stamp.size, most)
        tensors, values = _counts(cursor, file)
        metadata = _metadata(cursor, values, file)
        entries = [_entry(cursor, file) for _ in range(tensors)]
    alignment = _alignment(metadata, file)
    start = _aligned(cursor.position, alignment)
    shapes = {k.removeprefix(_ORIGINAL_SHAPE): v for k, v in metadata.items() if k.startswith(_ORIGINAL_SHAPE)}
    found = _placed(entries, file, start, alignment, stamp.size)
    named = {info.name: _in_own_shape(info, shapes.get(info.name), file) for info in found}
    if len(named) != len(entries):
        raise CheckpointCorrupt(f"{file} names a tensor twice.")
    return FileHeader(named, {k: str(v) for k, v in metadata.items() if isinstance(v, (str, int))}, stamp)


def _counts(cursor: Cursor, file: Path) -> tuple[int, int]:
    """How many tensors and how many entries of metadata there are."""
    if cursor.left < 24 or cursor.take(4) != MAGIC:
        raise CheckpointUnrecognised(f"{file} is not a GGUF file, or its start is damaged.")
    version = cursor.u32()
    if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
        raise CheckpointUnrecognised(
            f"{file} is a GGUF file for machines with the other byte order (big endian).",
            hint="the little-endian file of the same model",
        )
    if version not in _VERSIONS:
        raise CheckpointUnrecognised(
            f"{file} is a GGUF file of version {version}; versions 2 and 3 are read.",
            hint="the same model, converted by a tool of today",
        )
    tensors, values = cursor.u64(), cursor.u64()
    if max(tensors, values) > _MOST_NAMES:
        raise CheckpointUnrecognised(f"{file} has a header of more names than any model.")
    return tensors, values


def _metadata(cursor: Cursor, count: int, file: Path) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for _ in range(count):
        key = cursor.text(cursor.LONGEST_KEY)
        if key in found:
            raise CheckpointCorrupt(f"{file}: its header has two entries {key[:200]!r}.")
        found[key] = cursor.value(wanted=key.startswith(_ORIGINAL_SHAPE))
    parts = found.get("split.count", 1)
    if parts not in (0, 1):
        raise CheckpointUnrecognised(
            f"{file} is one part of a GGUF model in {parts} files; only whole ones are read.",
            hint="llama-gguf-split --merge, which makes one file of them",
        )
    return found


def _entry(cursor: Cursor, file: Path) -> _Entry:
    name, dimensions = cursor.text(_LONGEST_NAME), cursor.u32()
    if dimensions > _MOST_DIMENSIONS:
        raise CheckpointCorrupt(f"{file}: {name[:200]!r} has {dimensions} dimensions; at most 4 are possible.")
    # ggml names the columns first.
    shape = tuple(cursor.u64() for _ in range(dimensions))[::-1]
    return _Entry(name, cursor.u32(), shape, cursor.u64())


def _alignment(metadata: Mapping[str, Value], file: Path) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or not 0 < value <= _MOST_ALIGNMENT or value & (value - 1):
        raise CheckpointCorrupt(f"{file}: its alignment is no power of two up to {_MOST_ALIGNMENT}.")
    return value


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _placed(entries: list[_Entry], file: Path, start: int, alignment: int, size: int) -> list[TensorInfo]:
    """Where each tensor lies: one behind the other, each at the next multiple of the alignment."""
    found, end = [], start
    sized = sorted((e.offset, _nbytes(e, file) or 0, i) for i, e in enumerate(entries))
    for place, (offset, nbytes, index) in enumerate(sized):
        entry = entries[index]
        if start + offset != _aligned(end, alignment):
            raise CheckpointCorrupt(f"{file}: {entry.name[:200]!r} overlaps its neighbour or leaves a gap.")
        if entry.type not in _PLAIN and entry.type not in QUANTISED:
            # Nobody knows its size, and nobody reads it: it is all that lies before the next one.
            nbytes = (start + sized[place + 1][0] if place + 1 < len(sized) else size) - (start + offset)
            if nbytes < 0:
                raise CheckpointCorrupt(f"{file} is truncated: it has {size} bytes, its header promises more.")
        found.append(TensorInfo(entry.name, _dtype(entry.type), entry.shape, file, start + offset, nbytes))
        end = start + offset + nbytes
    if found and end > size:
        raise CheckpointCorrupt(f"{file} is truncated: it has {size} bytes, its header promises {end}.")
    if size > _aligned(end, alignment):
        raise CheckpointCorrupt(f"{file} has {size - end} bytes more than its header promises.")
    return found


def _dtype(type: int) -> str:
    if type in _PLAIN:
        return _PLAIN[type].name
    return DTYPE_PREFIX + (QUANTISED[type].name if type in QUANTISED else str(type))


def _nbytes(entry: _Entry, file: Path) -> int | None:
    """Bytes of a tensor; None for a type that is not known."""
    type = _PLAIN.get(entry.type) or QUANTISED.get(entry.type)
    if type is None:
        return None
    columns = entry.shape[-1] if entry.shape else 1
    if columns % type.block_size:
        raise CheckpointCorrupt(
            f"{file}: {entry.name[:200]!r} has rows of {columns} numbers, which are no whole {type.name} blocks "
            f"of {type.block_size}."
        )
    return prod(entry.shape) // type.block_size * type.block_bytes


def _in_own_shape(info: TensorInfo, shape: Value | None, file: Path) -> TensorInfo:
    """The tensor in the shape that it had before it was brought into rows of whole blocks."""
    if shape is None:
        return info
    if not isinstance(shape, tuple) or min(shape, default=0) < 0 or prod(shape) != prod(info.shape):
        raise CheckpointCorrupt(f"{file}: {info.name[:200]!r} does not fit the original shape that is noted for it.")
    return TensorInfo(info.name, info.dtype, shape, file, info.offset, info.nbytes)
