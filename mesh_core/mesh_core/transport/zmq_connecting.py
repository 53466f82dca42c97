"""Connecting to a worker over ZeroMQ: again where the handshake broke, until it is known why or the time is over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from time import monotonic, sleep

from mesh_core.errors import NotAuthorised, Unreachable
from mesh_core.transport.address import Place, is_loopback
from mesh_core.transport.keys import KeyPair, KeyStore, KnownWorker
from mesh_core.transport.reach import reach
from mesh_core.transport.zmq_channel import ZmqChannel, open_channel
from mesh_core.transport.zmq_refusals import HandshakeBroken, KeySource, another_worker, broken_off, check_mechanism
from mesh_core.transport.zmq_socket import Context, Wire

_PAUSES = (0.1, 0.2, 0.4, 0.8)
"""Seconds after each try but the last: a worker or a link that was lost for a moment is there again."""

_MOST_COMPARED = 16
"""Keys that are tried on a worker that does not prove the expected one."""

_COMPARING = 1.0
"""Seconds for each."""


@dataclass(frozen=True)
class Caller:
    """Whoever connects to one worker.

    Attributes:
        keys: its key pair and the worker's public key; None for no encryption.
        store: the workers that it knows.
        keeper: kept alive for as long as the channel.
        room: bytes of memory to share for each direction, where the worker is this user's own.
    """

    context: Context
    place: Place
    keys: tuple[KeyPair, str] | None
    store: KeyStore
    wire: Wire
    keeper: object
    room: int = 0

    def connect(self, timeout: float) -> ZmqChannel:
        """Raises as `mesh_core.transport.base.Transport.connect` does."""
        deadline, times = monotonic() + timeout, 0
        while True:
            found = reach(self.place, max(0.01, deadline - monotonic()))
            try:
                return self._open(found, self.keys, max(0.1, deadline - monotonic()))
            except HandshakeBroken as broken:
                times += 1
                check_mechanism(self.place, deadline - monotonic())
                if times > 1:
                    self._compare(found, deadline)
                if times > len(_PAUSES) or deadline - monotonic() < _PAUSES[times - 1]:
                    raise broken_off(self.place, times, self._source()) from broken
            sleep(_PAUSES[times - 1])

    def _open(self, numeric: str, keys: tuple[KeyPair, str] | None, timeout: float) -> ZmqChannel:
        wire, keeper, room = self.wire, self.keeper, self.room if keys is not None and self._own(keys) else 0
        return open_channel(
            self.context, self.place, numeric, keys, timeout=timeout, wire=wire, keeper=keeper, room=room
        )

    def _own(self, keys: tuple[KeyPair, str]) -> bool:
        """Whether both ends are this user's, as their keys prove when hands are shaken."""
        ours = self.store.identity()
        return keys == (ours.client, ours.server.public)

    def _source(self) -> KeySource:
        key = self.keys[1] if self.keys is not None else ""
        known = self.store.worker(self.place.netloc)
        if known is not None and known.key == key:
            return "joined"
        guessed = is_loopback(self.place.host) and key == self.store.identity().server.public
        return "guessed" if guessed else "given"

    def _compare(self, numeric: str, deadline: float) -> None:
        """Find out whether the worker is another one that this user knows.

        Raises:
            NotAuthorised: it has proven that.
        """
        if self.keys is None:
            return
        own, expected = self.keys
        for key, worker in islice(self._known(expected), _MOST_COMPARED):
            try:
                self._open(numeric, (own, key), max(0.01, min(_COMPARING, deadline - monotonic()))).close()
            except HandshakeBroken:
                continue
            except Unreachable:
                return
            except NotAuthorised:
                pass  # Only whoever has proven its key says that of ours.
            raise another_worker(self.place, worker, self._source())

    def _known(self, expected: str) -> Iterator[tuple[str, KnownWorker | None]]:
        own = self.store.identity().server.public
        known = {own: None, **{worker.key: worker for worker in self.store.workers()}}
        yield from ((key, worker) for key, worker in known.items() if key != expected)
