"""A TCP link between hosts and a worker that can be slow, break, swallow what crosses, or refuse to be opened."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import sleep

_PIECE = 16 << 10
_LOOK_EVERY = 0.02
"""Seconds between two looks whether a stopped link carries again."""


class FaultyLink:
    """Another address of a worker, through which its faults are under control.

    Args:
        address: of the worker, ``mesh://HOST:PORT``.
        rate: bytes per second that each connection carries one way; None for all that it can.

    Attributes:
        address: where hosts connect instead.
        rate: as above; may be changed at any time.
    """

    def __init__(self, address: str, rate: float | None = None) -> None:
        host, _, port = address.removeprefix("mesh://").rpartition(":")
        self._target, self.rate = (host, int(port)), rate
        self._lock = threading.Lock()
        self._ends: set[socket.socket] = set()
        self._stranded: set[socket.socket] = set()
        self._left: int | None = None
        self._carrying = threading.Event()
        self._carrying.set()
        self._refusing = self._closed = False
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"mesh://127.0.0.1:{self._server.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Break every connection now; new ones are taken."""
        with self._lock:
            ends, self._ends, self._left = self._ends, set(), None
            self._stranded.clear()
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def truncate(self, after: int) -> None:
        """Break every connection when ``after`` more bytes have crossed, wherever in a message that is."""
        with self._lock:
            self._left = after

    def stop(self) -> None:
        """Carry nothing more, without a word, until `carry`: as where a cable was pulled, or a machine sleeps."""
        self._carrying.clear()

    def carry(self) -> None:
        """Carry again what waited meanwhile."""
        self._carrying.set()

    def strand(self) -> None:
        """What is connected now carries nothing any more, and is never told; new connections work. So it is behind a
        router that forgot them."""
        with self._lock:
            self._stranded |= self._ends

    def refuse(self) -> None:
        """Break every connection, and each new one at once, until `accept`."""
        self._refusing = True
        self.cut()

    def accept(self) -> None:
        """Take new connections again."""
        self._refusing = False

    def heal(self) -> None:
        """No fault from here on; what is stranded stays so."""
        with self._lock:
            self._left = self.rate = None
        self.accept()
        self.carry()

    def close(self) -> None:
        """Free the address."""
        self._closed = True
        self.carry()
        # Closing alone does not wake a thread that waits in accept().
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()
        self._thread.join(10)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                host = self._server.accept()[0]
                if self._refusing:
                    host.close()
                    continue
                try:
                    worker = socket.create_connection(self._target, timeout=5)
                    worker.settimeout(None)
                except OSError:  # the worker is not there now
                    host.close()
                    continue
                with self._lock:
                    self._ends |= {host, worker}
                for pair in ((host, worker), (worker, host)):
                    threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(_PIECE):
                while source in self._stranded or not self._carrying.wait(_LOOK_EVERY):
                    sleep(_LOOK_EVERY)
                    if source not in self._ends:
                        return
                whole = self._allowed(data)
                target.sendall(whole)
                if len(whole) < len(data):
                    self.cut()
                    break
                if self.rate is not None:
                    sleep(len(data) / self.rate)
        for end in (source, target):
            with self._lock:
                self._ends.discard(end)
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _allowed(self, data: bytes) -> bytes:
        """The part of ``data`` that still crosses."""
        with self._lock:
            if self._left is None:
                return data
            whole = data[: self._left]
            self._left -= len(whole)
            return whole


@contextmanager
def faulty_link(address: str, rate: float | None = None) -> Iterator[FaultyLink]:
    """A `FaultyLink` to the worker at ``address``; closed at the end."""
    link = FaultyLink(address, rate)
    try:
        yield link
    finally:
        link.close()
