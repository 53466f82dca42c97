"""A TCP link between hosts and a worker that can be slow, break, swallow what crosses, or refuse to be opened."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import sleep

from tests.support.net import relayed

_PIECE = 16 << 10
_LOOK_EVERY = 0.02
"""Seconds between two looks whether a stopped link carries again."""


class FaultyLink:
    """What becomes of the bytes between hosts and a worker.

    Attributes:
        address: where hosts connect instead of the worker.
        rate: bytes per second that each connection carries one way; None for all that it can. May be changed at any
            time.
    """

    def __init__(self, rate: float | None = None) -> None:
        self.address, self.rate = "", rate
        self._lock = threading.Lock()
        self._ends: set[socket.socket] = set()
        self._stranded: set[socket.socket] = set()
        self._left: int | None = None
        self._carrying = threading.Event()
        self._carrying.set()
        self._refusing = self._dead = False

    def cut(self) -> None:
        """Break every connection now; new ones are taken."""
        with self._lock:
            ends, self._ends, self._left = self._ends, set(), None
            self._stranded.clear()
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def truncate(self, after: int) -> None:
        """Break every connection when ``after`` more bytes have crossed to the worker, wherever in a message that
        is."""
        with self._lock:
            self._left = after

    def stop(self) -> None:
        """Carry nothing more, without a word, until `carry`: as while a machine sleeps."""
        self._carrying.clear()

    def strand(self) -> None:
        """What is connected now carries nothing any more, and is never told; new connections work. So it is behind a
        router that forgot them."""
        with self._lock:
            self._stranded |= self._ends

    def go_dead(self) -> None:
        """What is connected now is stranded, and so is what connects before `heal`: a cable was pulled."""
        self._dead = True
        self.strand()

    def refuse(self) -> None:
        """Break every connection, and each new one at once, until `heal`."""
        self._refusing = True
        self.cut()

    def heal(self) -> None:
        """No fault from here on; what is stranded stays so."""
        with self._lock:
            self._left = self.rate = None
        self._refusing = self._dead = False
        self._carrying.set()

    def carry(self, source: socket.socket, target: socket.socket, number: int, there: bool) -> None:
        """Move what ``source`` gives, as `relayed` asks; ``there``: towards the worker."""
        with self._lock:
            self._ends |= {source, target}
            if self._dead:
                self._stranded |= {source, target}
        try:
            while not self._refusing and (data := source.recv(_PIECE)):
                if not self._may_cross(source):
                    return
                whole = self._allowed(data) if there else data
                target.sendall(whole)
                if len(whole) < len(data):
                    self.cut()
                    return
                if self.rate is not None:
                    sleep(len(data) / self.rate)
        finally:
            with self._lock:
                self._ends -= {source, target}

    def _may_cross(self, source: socket.socket) -> bool:
        """Waits while nothing is carried; whether the connection is still there then."""
        while source in self._stranded or not self._carrying.wait(_LOOK_EVERY):
            sleep(_LOOK_EVERY)
            if source not in self._ends:
                return False
        return True

    def _allowed(self, data: bytes) -> bytes:
        """The part of ``data`` that still crosses."""
        with self._lock:
            if self._left is None:
                return data
            whole = data[: self._left]
            self._left -= len(whole)
            return whole


@contextmanager
def faulty_link(worker: str, rate: float | None = None) -> Iterator[FaultyLink]:
    """A `FaultyLink` to the worker at the address ``worker``; every connection is cut at the end."""
    link = FaultyLink(rate)
    with relayed(worker, link.carry) as link.address:
        try:
            yield link
        finally:
            link.heal()
            link.refuse()
