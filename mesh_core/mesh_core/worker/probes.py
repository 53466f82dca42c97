"""Answers to probes: bytes that nobody may want, of which one host can ask for much. Knows no sockets."""

from __future__ import annotations

import weakref
from collections import Counter
from threading import RLock

from mesh_core.errors import WireTooLarge
from mesh_core.worker.quota import QUOTA


class _Zeros(bytearray):
    """Unlike its base, it can be asked whether it is still used."""


class ProbeAnswers:
    """Makes them, and knows how many wait to be sent: a transport keeps the memory of a message until it is."""

    def __init__(self) -> None:
        self._waiting: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        # The garbage collector may free one in the thread that holds it.
        self._lock = RLock()

    def make(self, key: str, size: int) -> bytearray:
        """``size`` bytes for the peer with this key.

        Raises:
            WireTooLarge: too much for it waits already.
        """
        with self._lock:
            if self._waiting[key] >= QUOTA.probes or self._bytes[key] + size > QUOTA.probe_bytes:
                raise WireTooLarge("Too many answers to probes of one host wait already.", hint="read the answers")
            self._count(key, 1, size)
        answer = _Zeros(size)
        weakref.finalize(answer, self._count, key, -1, -size).atexit = False
        return answer

    def _count(self, key: str, number: int, size: int) -> None:
        with self._lock:
            self._waiting[key] += number
            self._bytes[key] += size
            if not self._waiting[key]:
                del self._waiting[key], self._bytes[key]
