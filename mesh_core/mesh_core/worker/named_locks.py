"""One thing at a time for each name. Knows no sessions."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class NamedLocks:
    """A lock for every name that is in use; others take no memory."""

    def __init__(self) -> None:
        self._locks: dict[bytes, threading.Lock] = {}
        self._users: Counter[bytes] = Counter()
        self._guard = threading.Lock()

    @contextmanager
    def held(self, name: bytes) -> Iterator[None]:
        """Nobody else holds ``name`` meanwhile."""
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
            self._users[name] += 1
        try:
            with lock:
                yield
        finally:
            with self._guard:
                self._users[name] -= 1
                if not self._users[name]:
                    del self._users[name], self._locks[name]
