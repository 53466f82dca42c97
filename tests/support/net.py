"""Ports for servers that cannot be asked which one they took, and links that are slow, cut or dead."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import sleep

_PIECE = 16 << 10


def free_port() -> int:
    """A TCP port of the loopback that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class _Link:
    """One connection through a proxy."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.ends = near, far
        self.dead = False

    def close(self) -> None:
        for end in self.ends:
            # Closing alone does not wake a thread that waits in recv().
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class Proxy:
    """Another address of the worker at ``target``, over a link to which things happen.

    Args:
        rate: bytes per second that each connection carries one way; None for all that it can.
    """

    def __init__(self, target: str, rate: float | None = None) -> None:
        host, _, port = target.removeprefix("mesh://").rpartition(":")
        self._target, self._rate = (host, int(port)), rate
        self._links: list[_Link] = []
        self._left: int | None = None
        self._dead = False
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"mesh://127.0.0.1:{self._server.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """End all connections; new ones are taken."""
        links, self._links = self._links, []
        for link in links:
            link.close()

    def cut_after(self, nbytes: int) -> None:
        """End the connection that carries the last of the next ``nbytes`` to the worker, whatever it is carrying."""
        self._left = nbytes

    def go_dead(self) -> None:
        """From now on nothing arrives, and nothing is said of it; connections that are there stay like that."""
        self._dead = True
        for link in self._links:
            link.dead = True

    def heal(self) -> None:
        """New connections carry again what they are given."""
        self._dead = False

    def close(self) -> None:
        # Closing alone does not wake a thread that waits in accept().
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(10)
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near = self._server.accept()[0]
                try:
                    far = socket.create_connection(self._target)
                except OSError:
                    near.close()
                    continue
                link = _Link(near, far)
                link.dead = self._dead
                self._links.append(link)
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(link, source, target), daemon=True).start()

    def _carry(self, link: _Link, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(_PIECE):
                if link.dead:
                    continue
                if self._left is not None and target is link.ends[1]:
                    data = data[: self._left]
                    self._left -= len(data)
                    if not self._left:
                        self._left = None
                        target.sendall(data)
                        break
                target.sendall(data)
                if self._rate is not None:
                    sleep(len(data) / self._rate)
        link.close()


@contextmanager
def proxied(target: str, rate: float | None = None) -> Iterator[Proxy]:
    proxy = Proxy(target, rate)
    try:
        yield proxy
    finally:
        proxy.close()
