"""The header of a safetensors file: which tensors it holds, and where.

The format is specified at https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated

import msgspec

from mesh_codec.dtypes import from_safetensors
from mesh_codec.errors import CodecUnsupported
from mesh_core.errors import CheckpointCorrupt, CheckpointError, CheckpointUnrecognised

MAX_HEADER_BYTES = 32 << 20
"""Of a header that is read. The format allows 100 MB; a model's thousands of tensors take less than one."""

_MOST_NAMES = 100_000
"""Of tensors, of what is said of each (four), and of metadata. More would be slow to read, and no model has them."""

_Size = Annotated[int, msgspec.Meta(ge=0)]


class HeaderEntry(msgspec.Struct, gc=False, frozen=True):
    """What a header says of one tensor. Offsets count from the end of the header."""

    dtype: str
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(max_length=16)]
    data_offsets: tuple[_Size, _Size]


_NAMES = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENTRY = msgspec.json.Decoder(HeaderEntry)
_METADATA = msgspec.json.Decoder(dict[str, str] | None)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint: where its bytes are.

    Attributes:
        dtype: as safetensors names it, known to us or not.
        offset: of its first byte in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_safetensors_header(file: Path, most: int = MAX_HEADER_BYTES) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a file by name, and its metadata. Reads no tensor data, and trusts nothing that it reads.

    Args:
        most: bytes of a header that is parsed.

    Raises:
        CheckpointUnrecognised: not a safetensors file, or one with a header over the limit.
        CheckpointCorrupt: tensors that overlap, leave gaps, or do not fill the file.
        CheckpointError: the file cannot be read.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else size
            if size < 8 or length > size - 8:
                raise CheckpointUnrecognised(f"{file} is not a safetensors file, or its start is damaged.")
            check_header_size(length, most, str(file))
            header = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
    entries, metadata = parse_header(header, str(file))
    start = 8 + length
    tensors = {name: _tensor_info(file, name, entry, start) for name, entry in entries.items()}
    _check_layout(file, tensors, start, size)
    return tensors, metadata


def check_header_size(length: int, most: int, where: str) -> None:
    """Raises:
    CheckpointUnrecognised: a header of ``length`` bytes is over the limit.
    """
    if length > most:
        raise CheckpointUnrecognised(
            f"{where} has a header of {length / 1e6:.1f} MB; at most {most / 1e6:.1f} MB are read.",
            hint="a copy without the metadata that its trainer stored in it",
        )


def parse_header(header: bytes, where: str) -> tuple[dict[str, HeaderEntry], dict[str, str]]:
    """What a header says of tensors, by name, and the metadata; whether that is true is not known here. Time and memory
    are bounded by the header's size, since only what has the right form is ever built.

    Args:
        where: what an error names as its place.

    Raises:
        CheckpointUnrecognised: no JSON object, or one of very many names.
        CheckpointCorrupt: an entry or the metadata has another form.
    """
    if _names_at_most(header) > _MOST_NAMES:
        raise CheckpointUnrecognised(f"{where} has a header of more names than any model or LoRA.")
    try:
        raw = _NAMES.decode(header)
    except msgspec.ValidationError as error:
        raise CheckpointUnrecognised(f"{where} is not a safetensors file: its header is no JSON object.") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointUnrecognised(f"{where} is not a safetensors file: its header is not JSON ({error}).") from error
    try:
        metadata = _METADATA.decode(raw.pop("__metadata__", msgspec.Raw(b"null"))) or {}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointCorrupt(f"{where}: the metadata in its header is not text.") from error
    return {name: _entry(entry, name, where) for name, entry in raw.items()}, metadata


def _names_at_most(text: bytes) -> int:
    """No less than the number of names in JSON, without reading it. What looks like names inside of texts, such as the
    lists of tags that trainers store, is not counted: there, a backslash stands before the quote."""
    quoted = text.count(b'":') - text.count(b'\\":') + text.count(b'\\\\":')
    return quoted + sum(text.count(space + b":") for space in (b" ", b"\t", b"\n", b"\r"))


def _entry(raw: msgspec.Raw, name: str, where: str) -> HeaderEntry:
    try:
        return _ENTRY.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointCorrupt(f"{where}: the header's entry for {name[:200]!r} is damaged.") from error


def _tensor_info(file: Path, name: str, entry: HeaderEntry, start: int) -> TensorInfo:
    (begin, end), expected = entry.data_offsets, _nbytes(entry.dtype, entry.shape)
    if end < begin or expected not in (None, end - begin):
        raise CheckpointCorrupt(f"{file}: {name!r} does not have the size that its shape and dtype ask for.")
    return TensorInfo(name, entry.dtype, entry.shape, file, start + begin, end - begin)


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Bytes of a tensor; None for a type that we do not compute with, which is the adapter's to refuse."""
    try:
        return prod(shape) * from_safetensors(dtype).itemsize
    except CodecUnsupported:
        return None


def _check_layout(file: Path, tensors: Mapping[str, TensorInfo], start: int, size: int) -> None:
    position = start
    for info in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if info.offset != position:
            raise CheckpointCorrupt(f"{file}: {info.name!r} overlaps its neighbour or leaves a gap.")
        position += info.nbytes
    if position > size:
        raise CheckpointCorrupt(
            f"{file} is truncated: it has {size} bytes, its header promises {position}.", hint="copy it again"
        )
    if position < size:
        raise CheckpointCorrupt(f"{file} has {size - position} bytes more than its header promises.")
