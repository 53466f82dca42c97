"""Requests that take long: served in threads of their own, of which no host holds all."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from time import monotonic

from mesh_core import wire
from mesh_core.errors import WireTooLarge
from mesh_core.system.logs import logger
from mesh_core.transport.base import Peer
from mesh_core.worker.quota import QUOTA
from mesh_core.worker.replies import Replies
from mesh_core.worker.turns import Turns

log = logger(__name__)

Pieces = Iterator[None]
"""Work that is done piece by piece: what happens between two of its items is a piece."""


_ENDED = object()


class FairThreads:
    """Threads that take turns over the members whose work waits: a piece of each, and one work of a member after the
    other. They end with the process, whatever they do.

    Args:
        each: threads that one member has at most, so that another one's request finds one however long this one's
            takes.
    """

    def __init__(self, name: str, count: int, each: int) -> None:
        self._each = each
        self._turns: Turns[tuple[str, int, Pieces]] = Turns()
        self._running: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._stopping = False
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, key: str, work: Pieces, nbytes: int = 0) -> None:
        """Have ``work``, which raises nothing, done for the member with this key.

        Args:
            nbytes: that are held until it is done.

        Raises:
            WireTooLarge: too many requests of this member wait already, or too many bytes.
        """
        with self._changed:
            waiting = self._running[key] + self._turns.waiting(key, b"")
            if waiting >= QUOTA.requests or (waiting and self._bytes[key] + nbytes > QUOTA.request_bytes):
                raise WireTooLarge(f"{waiting} requests of one host wait already.", hint="wait for the answers")
            self._bytes[key] += nbytes
            self._turns.put(key, b"", (key, nbytes, work))
            self._changed.notify_all()

    def stop(self) -> None:
        """Drop what waits."""
        with self._changed:
            self._stopping = True
            self._turns.clear()
            self._changed.notify_all()

    def join(self, within: float) -> bool:
        """Wait until what runs has ended, ``within`` seconds at most; whether it has."""
        end = monotonic() + within
        for thread in self._threads:
            thread.join(max(end - monotonic(), 0))
        return not any(thread.is_alive() for thread in self._threads)

    def _next(self) -> tuple[str, int, Pieces] | None:
        with self._changed:
            while not self._stopping:
                found = self._turns.take(lambda key: self._running[key] < self._each)
                if found is not None:
                    self._running[found[0]] += 1
                    return found
                self._changed.wait()
            return None

    def _work(self) -> None:
        while (found := self._next()) is not None:
            key, nbytes, work = found
            ended = True
            try:
                ended = next(work, _ENDED) is _ENDED
            except Exception:
                # The thread must outlive a failure that cannot be told.
                log.exception("the answer to a request could not be sent")
            with self._changed:
                self._running -= Counter([key])
                if not ended and not self._stopping:
                    self._turns.put_back(key, b"", found)
                else:
                    self._bytes -= Counter({key: nbytes})
                self._changed.notify_all()
            # Frees the request's buffers now, not when the next one comes.
            del found, work


class RequestThreads:
    """Kinds of thread, so that what arrives over a slow link, what loads and what is hashed do not wait for each other.

    Attributes:
        loading: for what reads files, and for reaching other workers.
        receiving: one thread, for LoRAs that hosts send.
        hashing: for constants.
    """

    def __init__(self, replies: Replies) -> None:
        self._replies = replies
        self.loading = FairThreads("load", 4, each=2)
        self.receiving = FairThreads("lora", 1, each=1)
        self.hashing = FairThreads("hash", 2, each=1)

    def submit(
        self,
        threads: FairThreads,
        peer: Peer,
        message: wire.Message,
        work: Callable[[], Pieces | None],
        nbytes: int = 0,
    ) -> None:
        """Have ``work``, which answers ``message``, done in ``threads``; what it raises is the answer.

        Args:
            work: may return the pieces that it is done in.
            nbytes: of the message's buffers.

        Raises:
            WireTooLarge: see `FairThreads.submit`.
        """

        def run() -> Pieces:
            try:
                pieces = work()
                if pieces is not None:
                    yield from pieces
            except GeneratorExit:
                raise
            except BaseException as error:
                log.info("%s failed: %s", type(message).__name__, error)
                self._replies.fail(peer.route, message, error)

        threads.submit(peer.key, run(), nbytes)

    def stop(self) -> None:
        """Drop what waits."""
        for threads in (self.loading, self.receiving, self.hashing):
            threads.stop()

    def join(self, within: float) -> bool:
        """Wait until what runs has ended, ``within`` seconds at most; whether it has."""
        end = monotonic() + within
        kinds = (self.loading, self.receiving, self.hashing)
        return all(threads.join(end - monotonic()) for threads in kinds)
