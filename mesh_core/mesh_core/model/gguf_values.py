"""The values in the header of a GGUF file, read from its start on and never beyond what is there.

A count or a length is only believed once that many bytes are known to follow, so that time and memory are bounded by
the bytes that are read.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, ClassVar

from mesh_core.errors import CheckpointCorrupt, CheckpointUnrecognised
from mesh_core.model.safetensors import read_into

MAGIC = b"GGUF"

Value = str | int | tuple[int, ...] | None
"""Of one entry: a text, a whole number, a list of whole numbers that was asked for, or None for all others."""

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

_NUMBERS = {
    number: struct.Struct("<" + code)
    for number, code in {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "B",
        10: "Q",
        11: "q",
        12: "d",
    }.items()
}
"""By the number of a type, those of a fixed size."""

_INTEGERS = (0, 1, 2, 3, 4, 5, 10, 11)
_TEXT, _LIST = 8, 9

_PIECE = 1 << 18
"""Bytes that are read at once."""

_DEEPEST = 4
"""How deep lists are nested; ggml nests none."""

_MOST_LISTED = 2_000_000
"""Of texts and lists in lists of one header: a tokenizer has half a million."""

_LONGEST_SHAPE = 8


class Cursor:
    """Reads a header.

    Args:
        stream: at its start, unbuffered.
        file: what errors name.
        size: of the file.
        most: bytes that are read.
    """

    LONGEST_KEY: ClassVar[int] = (1 << 16) - 1
    """Of bytes in the name of an entry."""

    def __init__(self, stream: BinaryIO, file: Path, size: int, most: int) -> None:
        self._stream, self._file, self._size, self._most = stream, file, size, most
        self._held, self._at, self._before = b"", 0, 0
        self._listed = 0

    @property
    def position(self) -> int:
        """Bytes that were taken."""
        return self._before + self._at

    @property
    def left(self) -> int:
        """Bytes of the file behind `position`."""
        return self._size - self.position

    def take(self, count: int) -> bytes:
        """The next bytes.

        Raises:
            CheckpointCorrupt: the file ends before.
            CheckpointUnrecognised: they are beyond the limit.
            CheckpointError: the file cannot be read.
        """
        stop = self._at + count
        if stop > len(self._held):
            self._check(count)
            missing = bytearray(min(max(stop - len(self._held), _PIECE), self._size - self._before - len(self._held)))
            read_into(self._stream, memoryview(missing), self._file)
            self._before, self._held = self.position, self._held[self._at :] + missing
            self._at, stop = 0, count
        found = self._held[self._at : stop]
        self._at = stop
        return found

    def skip(self, count: int) -> None:
        """Raises as `take`."""
        self._check(count)
        while count:
            step = min(count, _PIECE)
            self.take(step)
            count -= step

    def u32(self) -> int:
        """Raises as `take`."""
        return int(_U32.unpack(self.take(4))[0])

    def u64(self) -> int:
        """Raises as `take`."""
        return int(_U64.unpack(self.take(8))[0])

    def text(self, most: int) -> str:
        """A text of at most so many bytes.

        Raises:
            CheckpointCorrupt: longer, or not UTF-8. Otherwise as `take`.
        """
        length = self.u64()
        if length > most:
            raise CheckpointCorrupt(f"{self._file}: its header has a text of {length} bytes where {most} are possible.")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise CheckpointCorrupt(f"{self._file}: a text in its header is not UTF-8.") from error

    def value(self, *, wanted: bool) -> Value:
        """The next value with its type.

        Args:
            wanted: of a list of whole numbers as well, which has to be one and short.

        Raises:
            CheckpointCorrupt: no known type, or a list over a limit. Otherwise as `take`.
        """
        type = self.u32()
        if type == _TEXT:
            return self.text(self._most)
        if type == _LIST:
            if wanted:
                return self._integers()
            self._skip_list(1)
            return None
        number = self._unpack(type)
        return number if type in _INTEGERS else None

    def _unpack(self, type: int) -> int:
        form = self._form(type)
        (number,) = form.unpack(self.take(form.size))
        return number  # type: ignore[no-any-return]

    def _form(self, type: int) -> struct.Struct:
        found = _NUMBERS.get(type)
        if found is None:
            raise CheckpointCorrupt(f"{self._file}: its header has a value of unknown type {type}.")
        return found

    def _integers(self) -> tuple[int, ...]:
        type, count = self.u32(), self.u64()
        if type not in _INTEGERS or count > _LONGEST_SHAPE:
            raise CheckpointCorrupt(f"{self._file}: a shape in its header is no short list of whole numbers.")
        return tuple(self._unpack(type) for _ in range(count))

    def _skip_list(self, depth: int) -> None:
        type, count = self.u32(), self.u64()
        if type not in (_TEXT, _LIST):
            self.skip(self._form(type).size * count)
            return
        self._listed += count
        if depth >= _DEEPEST or self._listed > _MOST_LISTED:
            raise CheckpointUnrecognised(f"{self._file}: its header has lists longer or deeper than any model's.")
        for _ in range(count):
            if type == _TEXT:
                self.skip(self.u64())
            else:
                self._skip_list(depth + 1)

    def _check(self, count: int) -> None:
        if count > self.left:
            raise CheckpointCorrupt(f"{self._file} is truncated or damaged: its header goes on beyond its end.")
        if self.position + count > self._most:
            raise CheckpointUnrecognised(
                f"{self._file} has a header of more than {self._most / 1e6:.1f} MB, which is not read.",
                hint="a copy without the metadata that its maker stored in it",
            )
