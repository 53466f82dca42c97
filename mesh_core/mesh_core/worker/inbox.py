"""In what order a worker reads what hosts send: whoever has cost it least time comes first. Knows no messages."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from time import monotonic

from mesh_core.errors import MeshError, WireTooLarge
from mesh_core.transport.base import Listener, Peer, UnfitMessage
from mesh_core.worker.quota import QUOTA

Read = Callable[[Peer, list[memoryview]], None]
"""What is done with a message."""

_AT_ONCE = 64
"""Messages that are taken from the listener before one is read."""


class Inbox:
    """Messages of ``listener`` by the key of who sent them, each key's in their order. For one thread.

    However much one key sends, a message of another waits for those that it comes after by time, not by number.

    Args:
        refuse: called with whose message is not as it must be, or one too many of its key, and why.
    """

    def __init__(self, listener: Listener, refuse: Callable[[Peer, MeshError], None]) -> None:
        self._listener, self._refuse = listener, refuse
        self._waiting: dict[str, deque[tuple[Peer, list[memoryview]]]] = {}
        self._bytes: Counter[str] = Counter()
        self._spent: dict[str, float] = {}
        self._now = 0.0

    def read_one(self, timeout: float, read: Read) -> None:
        """Have ``read`` read the message that is next, waiting for one up to ``timeout`` seconds."""
        self._take(timeout)
        if not self._waiting:
            return
        key = min(self._waiting, key=lambda waiting: self._spent[waiting])
        peer, frames = self._waiting[key].popleft()
        self._bytes[key] -= _size(frames)
        if not self._waiting[key]:
            del self._waiting[key], self._bytes[key]
        self._now = self._spent[key]
        before = monotonic()
        read(peer, frames)
        self._spent[key] += monotonic() - before

    def _take(self, timeout: float) -> None:
        for _ in range(_AT_ONCE):
            try:
                got = self._listener.receive(0.0 if self._waiting else timeout)
            except UnfitMessage as unfit:
                self._refuse(unfit.peer, unfit.error)
                return
            if got is None:
                return
            self._put(*got)

    def _put(self, peer: Peer, frames: list[memoryview]) -> None:
        key, size = peer.key, _size(frames)
        queue = self._waiting.get(key, ())
        if queue and (len(queue) >= QUOTA.messages or self._bytes[key] + size > QUOTA.message_bytes):
            self._refuse(peer, WireTooLarge("Too many messages of this key wait already.", hint="wait for the answers"))
            return
        if key not in self._waiting:
            # Idle time is not saved up, so that who has spent less than that is as good as new.
            self._spent = {k: spent for k, spent in self._spent.items() if spent > self._now or k in self._waiting}
            self._spent.setdefault(key, self._now)
        self._waiting.setdefault(key, deque()).append((peer, frames))
        self._bytes[key] += size


def _size(frames: list[memoryview]) -> int:
    return sum(frame.nbytes for frame in frames)
