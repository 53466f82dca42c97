"""One thread that works for many hosts, a piece for each in turn, so that none waits for all that another asked for."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator

log = logging.getLogger(__name__)


class Turns:
    """Works are iterators: what happens between two of their items is a piece. Works of one key are done one after the
    other; of several keys, a piece of each in turn.
    """

    def __init__(self, name: str) -> None:
        self._queues: dict[str, deque[Iterator[None]]] = {}
        self._ready = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, key: str, work: Iterator[None]) -> None:
        """Have ``work`` done after what waits for ``key`` already."""
        with self._ready:
            if not self._stopping:
                self._queues.setdefault(key, deque()).append(work)
                self._ready.notify()

    def stop(self, timeout: float) -> None:
        """Drop what waits, and return when the piece that runs has ended, at the latest after ``timeout`` seconds."""
        with self._ready:
            self._stopping = True
            self._ready.notify()
        self._thread.join(timeout)

    def _work(self) -> None:
        while (turn := self._next()) is not None:
            key, work = turn
            try:
                next(work)
                ended = False
            except StopIteration:
                ended = True
            except Exception:
                # The one thread for all must outlive a failure that its work did not tell itself.
                log.exception("a request failed without an answer")
                ended = True
            with self._ready:
                queue = self._queues.pop(key)
                if ended:
                    queue.popleft()
                if queue:
                    self._queues[key] = queue

    def _next(self) -> tuple[str, Iterator[None]] | None:
        """The key whose turn it is, which stays in its place until the piece is done, and its first work."""
        with self._ready:
            while not self._queues and not self._stopping:
                self._ready.wait()
            if self._stopping:
                return None
            key, queue = next(iter(self._queues.items()))
            return key, queue[0]
