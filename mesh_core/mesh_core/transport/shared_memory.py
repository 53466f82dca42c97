"""Memory that two processes of one user on one machine share: made by one, opened by the other by plain numbers.

It is a memfd, which has no name in any folder: it is gone with the last process that has it, however that ends. Its
size is sealed, so that nobody can take memory away under whoever reads it. Linux alone has this; elsewhere `available`
says so, and everything crosses the socket.

The other process opens it through the maker's list of open files in /proc, which the system allows to the same user
only. That both have the same memory is proven by what only this memory holds, see `SharedMemory.nonce`.
"""

from __future__ import annotations

import mmap
import os
import sys
from contextlib import suppress
from secrets import token_bytes
from time import sleep
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesh_core.errors import WireMalformed

SLOTS = 256
"""Pieces of memory that one direction can have in use at a time."""

NONCE_BYTES = 32

_PAGE = 4096
_HEAD = 2 * _PAGE
"""Bytes before the data: a page with the nonce, then `SLOTS` numbers of 8 bytes for each direction."""

_LARGEST = 4 << 30
_TRIES, _PAUSE = 100, 1e-3
_OS: Any = os
"""Some of it is Linux's alone."""

_NAME = "comfyui-mesh"

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.uint64]


def available() -> bool:
    """Whether this system has what is needed."""
    return sys.platform == "linux" and hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")


class SharedMemory:
    """Two areas of `room` bytes, one for each direction, and their flags.

    Attributes:
        room: bytes of one area.
        nonce: random bytes that stand in the memory and nowhere else.
        areas: from the maker to the other process, and back.
        flags: of the areas; the receiver of an area writes them, see `mesh_core.transport.slots`.
        maker, number: process and file descriptor under which the other process finds it.
    """

    def __init__(self, descriptor: int, room: int) -> None:
        """Takes ``descriptor`` over."""
        self.room, self._descriptor, self._fcntl = room, descriptor, _linux().fcntl
        self.maker, self.number = os.getpid(), descriptor
        memory = mmap.mmap(descriptor, _HEAD + 2 * room)
        # Views keep the mapping; it goes with the last of them.
        whole: Bytes = np.frombuffer(memory, np.uint8)
        self._nonce = whole[:NONCE_BYTES]
        numbers: Numbers = whole[_PAGE:_HEAD].view(np.uint64)
        self.flags = numbers[:SLOTS], numbers[SLOTS:]
        self.areas = whole[_HEAD : _HEAD + room], whole[_HEAD + room :]

    @property
    def nonce(self) -> bytes:
        """What the memory holds now."""
        return self._nonce.tobytes()

    @classmethod
    def make(cls, room: int) -> SharedMemory:
        """New memory of twice ``room`` bytes, whole pages; none of it is taken from the system yet.

        Raises:
            OSError: the system has none, or no file descriptor.
        """
        system = _linux()
        descriptor = system.memfd_create(_NAME, system.MFD_CLOEXEC | system.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, _HEAD + 2 * room)
            fcntl = system.fcntl
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            _OS.posix_fallocate(descriptor, 0, _HEAD)
            made = cls(descriptor, room)
        except BaseException:
            os.close(descriptor)
            raise
        made._nonce[:] = np.frombuffer(token_bytes(NONCE_BYTES), np.uint8)
        return made

    @classmethod
    def open(cls, maker: int, number: int, room: int) -> SharedMemory:
        """The memory that process ``maker`` has as file descriptor ``number``.

        Raises:
            OSError: there is no such file, or it is another user's.
            WireMalformed: what is there is not what `make` makes.
        """
        system, path = _linux(), f"/proc/{maker}/fd/{number}"
        if not 0 < room <= _LARGEST or room % _PAGE:
            raise WireMalformed(f"Memory of {room} bytes is not shared.")
        # Looked at before it is opened: opening a pipe or a device may wait or do something.
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            raise WireMalformed(f"File {number} of process {maker} is no memory of the mesh.")
        descriptor = os.open(path, os.O_RDWR | _OS.O_CLOEXEC | _OS.O_NONBLOCK)
        try:
            state, fcntl = os.fstat(descriptor), system.fcntl
            sealed = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
            if state.st_uid != _OS.geteuid():
                raise WireMalformed("The memory is another user's.")
            if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & sealed != sealed or state.st_size != _HEAD + 2 * room:
                raise WireMalformed("The memory has another size than was said, or one that can change.")
            return cls(descriptor, room)
        except BaseException:
            os.close(descriptor)
            raise

    def reserve(self, direction: int, start: int, stop: int) -> bool:
        """Have the system set aside these bytes of an area; false if it has none left, which would end the process
        that writes to them."""
        try:
            _OS.posix_fallocate(self._descriptor, _HEAD + direction * self.room + start, stop - start)
        except OSError:
            return False
        return True

    def hold(self) -> None:
        """Be known as one who uses it, until it is closed or the process ends.

        Raises:
            OSError: another process keeps that from happening.
        """
        for _ in range(_TRIES):
            try:
                self._fcntl.flock(self._descriptor, self._fcntl.LOCK_SH | self._fcntl.LOCK_NB)
                return
            except BlockingIOError:
                sleep(_PAUSE)  # `abandoned` takes no longer
        raise BlockingIOError("another process has locked the memory")

    def abandoned(self) -> bool:
        """Whether the other process does not `hold` it any more; for one that does not itself."""
        try:
            self._fcntl.flock(self._descriptor, self._fcntl.LOCK_EX | self._fcntl.LOCK_NB)
        except OSError:
            return False
        self._fcntl.flock(self._descriptor, self._fcntl.LOCK_UN)
        return True

    def close(self) -> None:
        """Tell the other process that nothing follows. What was handed out stays readable. May be called twice."""
        descriptor, self._descriptor = getattr(self, "_descriptor", -1), -1
        if descriptor >= 0:
            with suppress(OSError):
                # The mapping has the file open as well, and would keep the lock.
                self._fcntl.flock(descriptor, self._fcntl.LOCK_UN)
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


class _Linux:
    """What the type checker does not know of on other systems."""

    def __init__(self) -> None:
        import fcntl

        system: Any = os
        self.fcntl: Any = fcntl
        self.memfd_create, self.MFD_CLOEXEC = system.memfd_create, system.MFD_CLOEXEC
        self.MFD_ALLOW_SEALING: int = system.MFD_ALLOW_SEALING


def _linux() -> _Linux:
    if not available():
        raise OSError("this system shares no memory that has no name")
    return _Linux()
