"""What was read of files, kept while they do not change and while there is not too much of it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from mesh_core.system.file_stamp import FileStamp

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Stamped(Generic[K, V]):
    """Thread-safe. What was used least recently goes first.

    Args:
        most: how much is kept, in whatever ``weight`` counts.
        weight: of one value; at least 1.
    """

    def __init__(self, most: int, weight: Callable[[V], int] = lambda value: 1) -> None:
        self._most, self._weight = most, weight
        self._held: OrderedDict[K, tuple[FileStamp, V]] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()

    def get(self, key: K, stamp: FileStamp, read: Callable[[], V]) -> V:
        """What is kept for a file in that state, else what ``read`` returns."""
        with self._lock:
            known = self._held.get(key)
            if known is not None and known[0] == stamp:
                self._held.move_to_end(key)
                return known[1]
        value = read()
        with self._lock:
            self._drop(key)
            self._held[key] = stamp, value
            self._total += self._weight(value)
            while self._total > self._most and len(self._held) > 1:
                self._drop(next(iter(self._held)))
        return value

    def _drop(self, key: K) -> None:
        known = self._held.pop(key, None)
        if known is not None:
            self._total -= self._weight(known[1])
