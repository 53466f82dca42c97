"""Whether a file is still the one that it was, as far as its file system tells."""

from __future__ import annotations

import os
from dataclasses import astuple, dataclass
from pathlib import Path
from time import sleep, time_ns

_TICK_NS = 20_000_000
"""Times of files advance in ticks of the system's clock, of at most 10 ms."""

_COARSE_NS = 2_000_000_000
"""What they advance by where a file system keeps whole seconds (FAT: every other)."""

_PATIENCE = 3


@dataclass(frozen=True)
class FileStamp:
    """What changes when a file is replaced or written to, whatever its modification time is set to afterwards.

    Always taken from an open file: Windows' folders keep sizes and times that lag behind.

    Attributes:
        number: the inode; Windows' file index.
        changed_ns: when content or attributes last changed, which no program can set. Windows does not tell, it is
            the time of creation there.
    """

    size: int
    modified_ns: int
    number: int
    changed_ns: int

    @classmethod
    def of(cls, descriptor: int) -> FileStamp:
        """Of an open file."""
        found = os.fstat(descriptor)
        return cls(found.st_size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns)

    @classmethod
    def at(cls, path: Path) -> FileStamp:
        """Of the file at ``path``, see `settled`. Raises OSError."""
        with path.open("rb") as stream:
            return cls.settled(stream.fileno())

    @classmethod
    def settled(cls, descriptor: int) -> FileStamp:
        """Of an open file, so that any later write makes another stamp: not within the tick of the last write.

        Waits for a tick, and a few more of a file that is being written to.
        """
        found = cls.of(descriptor)
        for _ in range(_PATIENCE):
            whole_seconds = max(found.modified_ns, found.changed_ns) % 1_000_000_000 == 0
            tick = _COARSE_NS if whole_seconds else _TICK_NS
            if not found._is_fresh(tick):
                break
            sleep(tick / 1e9)
            found = cls.of(descriptor)
        return found

    def plain(self) -> list[int]:
        """As JSON takes it."""
        return list(astuple(self))

    def _is_fresh(self, within: int) -> bool:
        now = time_ns()
        return any(abs(now - time) < within for time in (self.modified_ns, self.changed_ns))
