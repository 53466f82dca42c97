"""Requests that take long: served in threads of their own, of which no host holds all."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from time import monotonic
from typing import NamedTuple

from mesh_core import wire
from mesh_core.errors import WireTooLarge
from mesh_core.system.logs import logger
from mesh_core.transport.base import Peer
from mesh_core.worker.quota import QUOTA
from mesh_core.worker.replies import Replies
from mesh_core.worker.turns import Turns

log = logger(__name__)

PieceByPiece = Iterator[None]
"""Work that is done piece by piece: what happens between two of its items is a piece."""


class _Work(NamedTuple):
    """Of a member with this key.

    Attributes:
        line: of works that are done one after the other, in the order in which they came; b"" for none.
    """

    key: str
    nbytes: int
    line: bytes
    pieces: PieceByPiece


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
        self._turns: Turns[_Work] = Turns()
        self._behind: dict[tuple[str, bytes], deque[_Work]] = {}
        self._running: Counter[str] = Counter()
        self._unfinished: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._stopping = False
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, key: str, work: PieceByPiece, nbytes: int = 0, line: bytes = b"") -> None:
        """Have ``work``, which raises nothing, done for the member with this key.

        Args:
            nbytes: that are held until it is done.
            line: begin once the earlier works of the member's with this name are done; b"" for no name.

        Raises:
            WireTooLarge: too many requests of this member wait already, or too many bytes.
        """
        with self._changed:
            waiting = self._unfinished[key]
            if waiting >= QUOTA.requests or (waiting and self._bytes[key] + nbytes > QUOTA.request_bytes):
                raise WireTooLarge(f"{waiting} requests of one host wait already.", hint="wait for the answers")
            self._bytes[key] += nbytes
            self._unfinished[key] += 1
            item = _Work(key, nbytes, line, work)
            if line and (key, line) in self._behind:
                self._behind[key, line].append(item)
                return
            if line:
                self._behind[key, line] = deque()
            self._turns.put(key, b"", item)
            self._changed.notify_all()

    def stop(self) -> None:
        """Drop what waits."""
        with self._changed:
            self._stopping = True
            self._turns.clear()
            self._behind.clear()
            self._changed.notify_all()

    def join(self, within: float) -> bool:
        """Wait until what runs has ended, ``within`` seconds at most; whether it has."""
        end = monotonic() + within
        for thread in self._threads:
            thread.join(max(end - monotonic(), 0))
        return not any(thread.is_alive() for thread in self._threads)

    def _next(self) -> _Work | None:
        with self._changed:
            while not self._stopping:
                found = self._turns.take(lambda key: self._running[key] < self._each)
                if found is not None:
                    self._running[found.key] += 1
                    return found
                self._changed.wait()
            return None

    def _work(self) -> None:
        while (found := self._next()) is not None:
            ended = True
            try:
                ended = next(found.pieces, _ENDED) is _ENDED
            except Exception:
                # The thread must outlive a failure that cannot be told.
                log.exception("the answer to a request could not be sent")
            with self._changed:
                self._running -= Counter([found.key])
                if not ended and not self._stopping:
                    self._turns.put_back(found.key, b"", found)
                else:
                    self._finish(found)
                self._changed.notify_all()
            # Frees the request's buffers now, not when the next one comes.
            del found

    def _finish(self, work: _Work) -> None:
        self._bytes -= Counter({work.key: work.nbytes})
        self._unfinished -= Counter([work.key])
        behind = self._behind.get((work.key, work.line))
        if behind:
            self._turns.put(work.key, b"", behind.popleft())
        elif behind is not None:
            del self._behind[work.key, work.line]


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
        work: Callable[[], PieceByPiece | None],
        nbytes: int = 0,
        line: bytes = b"",
    ) -> None:
        """Have ``work``, which answers ``message``, done in ``threads``; what it raises is the answer.

        Args:
            work: may return the pieces that it is done in.
            nbytes: of the message's buffers.
            line: see `FairThreads.submit`.

        Raises:
            WireTooLarge: see `FairThreads.submit`.
        """

        def run() -> PieceByPiece:
            try:
                pieces = work()
                if pieces is not None:
                    yield from pieces
            except GeneratorExit:
                raise
            except BaseException as error:
                log.info("%s failed: %s", type(message).__name__, error)
                self._replies.fail(peer.route, message, error)

        threads.submit(peer.key, run(), nbytes, line)

    def stop(self) -> None:
        """Drop what waits."""
        for threads in (self.loading, self.receiving, self.hashing):
            threads.stop()

    def join(self, within: float) -> bool:
        """Wait until what runs has ended, ``within`` seconds at most; whether it has."""
        end = monotonic() + within
        kinds = (self.loading, self.receiving, self.hashing)
        return all(threads.join(end - monotonic()) for threads in kinds)
