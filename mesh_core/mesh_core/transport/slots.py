"""One direction of shared memory: the sender puts bytes into slots, the receiver reads them there and gives them back.

Where a slot lies is the sender's affair, and is told in the message: `SlotPlace`. The receiver believes none of it. A
slot is free again when the receiver has written the number of its use into the slot's flag. Neither ever waits for the
other: what finds no room is sent in another way.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mesh_core.errors import WireMalformed
from mesh_core.transport.shared_memory import SLOTS, Bytes, Numbers, SharedMemory

_PAGE = 4096


class SlotPlace(NamedTuple):
    """Where bytes lie: slot, the number of its use (from 1), bytes from the start of the area, bytes."""

    slot: int
    use: int
    offset: int
    size: int


@dataclass
class _Used:
    """A slot in use, and the whole pages that it takes."""

    use: int
    start: int
    stop: int


class SlotWriter:
    """The sender's end. Any thread may use it.

    Args:
        direction: 0 from the memory's maker, 1 to it.
    """

    def __init__(self, memory: SharedMemory, direction: int) -> None:
        self._memory, self._direction = memory, direction
        self._area, self._flags = memory.areas[direction], memory.flags[direction]
        self._used: dict[int, _Used] = {}
        self._uses = [0] * SLOTS
        self._reserved = 0
        self._lock = threading.Lock()

    def put(self, data: memoryview) -> SlotPlace | None:
        """Copy ``data`` into a slot; None where there is no room now."""
        place = self._allocate(data.nbytes)
        if place is not None:
            copy(data, self._area[place.offset : place.offset + place.size])
        return place

    def take_back(self, slot: int) -> None:
        """Nobody was told of a slot: it is free."""
        with self._lock:
            self._used.pop(slot, None)

    def _allocate(self, size: int) -> SlotPlace | None:
        pages = -(-size // _PAGE) * _PAGE
        with self._lock:
            freed = [number for number, used in self._used.items() if int(self._flags[number]) == used.use]
            for number in freed:
                del self._used[number]
            slot = next((number for number in range(SLOTS) if number not in self._used), None)
            start = self._gap(pages)
            if slot is None or start is None:
                return None
            if start + pages > self._reserved:
                if not self._memory.reserve(self._direction, self._reserved, start + pages):
                    return None
                self._reserved = start + pages
            self._uses[slot] += 1
            self._used[slot] = _Used(self._uses[slot], start, start + pages)
            return SlotPlace(slot, self._uses[slot], start, size)

    def _gap(self, pages: int) -> int | None:
        """The lowest place with so much room: memory that was used before is there already, and fast."""
        start = 0
        for used in sorted(self._used.values(), key=lambda used: used.start):
            if used.start - start >= pages:
                return start
            start = used.stop
        return start if len(self._area) - start >= pages else None


class SlotReader:
    """The receiver's end. One thread reads; what it hands out may be dropped in any.

    What is handed out is the memory itself for as long as not more than half of the area is out: who keeps states for
    long must not leave the sender without room. Beyond that it is a copy.
    """

    def __init__(self, memory: SharedMemory, direction: int) -> None:
        self._area, self._flags = memory.areas[direction], memory.flags[direction]
        self._out: dict[int, int] = {}
        self._last = [0] * SLOTS
        # The garbage collector may drop a view in the thread that holds it.
        self._lock = threading.RLock()

    def take(self, place: SlotPlace) -> memoryview:
        """The bytes at ``place``; the slot is given back with the last view of them.

        Raises:
            WireMalformed: it is not within the area, or not one that can have been used now.
        """
        slot, use, offset, size = place
        if not (slot < SLOTS and 0 < size <= len(self._area) and offset <= len(self._area) - size):
            raise WireMalformed(
                f"A message says that {size} bytes lie at {offset} of a shared memory of {len(self._area)} bytes."
            )
        with self._lock:
            if slot in self._out or use <= self._last[slot]:
                raise WireMalformed(
                    f"A message says that slot {slot} of a shared memory is used again, which it is not."
                )
            self._last[slot] = use
            found = self._area[offset : offset + size]
            if sum(self._out.values()) + size > len(self._area) // 2:
                kept = np.empty(size, np.uint8)
                copy(found.data, kept)
                self._flags[slot] = use
                return kept.data
            self._out[slot] = size
        weakref.finalize(found, _give_back, self._lock, self._out, self._flags, slot, use).atexit = False
        return found.data


def copy(source: memoryview, target: Bytes) -> None:
    """Copy bytes; other threads run meanwhile."""
    np.copyto(target, np.frombuffer(source, np.uint8))


def _give_back(lock: threading.RLock, out: dict[int, int], flags: Numbers, slot: int, use: int) -> None:
    with lock:
        out.pop(slot, None)
        flags[slot] = use
