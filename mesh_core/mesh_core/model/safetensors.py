"""A safetensors file: which tensors it holds and where, and reading their bytes from that file and no other.

The format is specified at https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec

from mesh_codec.dtypes import from_safetensors
from mesh_codec.errors import CodecUnsupported
from mesh_core.errors import CheckpointChanged, CheckpointCorrupt, CheckpointError, CheckpointUnrecognised
from mesh_core.model.stored import TensorInfo
from mesh_core.system.file_stamp import FileStamp

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

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class FileHeader:
    """What the header of one file says, and the stamp of that file."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    stamp: FileStamp


def read_safetensors_header(file: Path, most: int = MAX_HEADER_BYTES) -> FileHeader:
    """The header of a file. Reads no tensor data, and trusts nothing that it reads.

    Args:
        most: bytes of a header that is parsed.

    Raises:
        CheckpointUnrecognised: not a safetensors file, or one with a header over the limit.
        CheckpointCorrupt: tensors that overlap, leave gaps, or do not fill the file.
        CheckpointChanged: the file is being written to.
        CheckpointError: the file cannot be read.
    """
    try:
        with file.open("rb") as stream:
            stamp = FileStamp.settled(stream.fileno())
            size, start = stamp.size, stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if size < 8 or length > size - 8:
                raise _another_format(file, start)
            check_header_size(length, most, str(file))
            header = stream.read(length)
            _check_same(stream, stamp, file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
    entries, metadata = parse_header(header, str(file))
    begin = 8 + length
    tensors = {name: _tensor_info(file, name, entry, begin) for name, entry in entries.items()}
    _check_layout(file, tensors, begin, size)
    return FileHeader(tensors, metadata, stamp)


def refuse_lfs_pointer(file: Path, start: bytes) -> None:
    """Raises:
    CheckpointUnrecognised: ``start``, 8 bytes or more of a file's content, is what Git LFS puts in a file's place.
    """
    if start and start[: len(_LFS_POINTER)] == _LFS_POINTER[: len(start)]:
        raise CheckpointUnrecognised(
            f"{file} is a pointer of Git LFS: the file itself was not downloaded.", hint="git lfs pull in its folder"
        )


def _another_format(file: Path, start: bytes) -> CheckpointUnrecognised:
    if start[:4] == b"GGUF":
        message, hint = "is a GGUF file, which only holds models", "the .safetensors file of the same content"
    else:
        refuse_lfs_pointer(file, start)
        message, hint = "is not a safetensors file, or its start is damaged", ""
    return CheckpointUnrecognised(f"{file} {message}.", hint=hint)


@contextmanager
def opened(file: Path, stamp: FileStamp | None) -> Iterator[BinaryIO]:
    """The file for reading, unbuffered; what was read of it may be used once the context has ended.

    Args:
        stamp: what it had when its header was read; None if nobody knows.

    Raises:
        CheckpointChanged: it is another file now, or was written to, before or meanwhile.
        CheckpointError: it cannot be opened.
    """
    try:
        stream = file.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from error
    with stream:
        expected = stamp or FileStamp.of(stream.fileno())
        _check_same(stream, expected, file)
        try:
            yield stream
        except CheckpointCorrupt:
            _check_same(stream, expected, file)
            raise
        _check_same(stream, expected, file)


def read_into(stream: BinaryIO, target: memoryview, file: object) -> None:
    """Fill ``target`` from an unbuffered file.

    Raises:
        CheckpointError: the file cannot be read, or ends early.
    """
    done = 0
    while done < len(target):
        try:
            count = stream.readinto(target[done:])  # type: ignore[attr-defined]
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error}.") from error
        if not count:
            raise CheckpointCorrupt(f"{file} ends early.")
        done += count


def _check_same(stream: BinaryIO, stamp: FileStamp, file: Path) -> None:
    if FileStamp.of(stream.fileno()) != stamp:
        raise CheckpointChanged(
            f"{file} changed while it was in use: it is not the file any more whose header was read.",
            hint="the same again, once nothing writes to the file",
        )


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
        raise CheckpointCorrupt(f"{file} is truncated: it has {size} bytes, its header promises {position}.")
    if position < size:
        raise CheckpointCorrupt(f"{file} has {size - position} bytes more than its header promises.")
