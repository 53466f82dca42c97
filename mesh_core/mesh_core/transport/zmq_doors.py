"""Who holds connections to a listener: so many that others find none left are closed. Knows no messages.

libzmq takes every connection, and gives a stranger some seconds for the handshake. So the connections of one address
that have not said anything are few, and those of one key are: libzmq names each by its file descriptor.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from secrets import token_hex
from time import monotonic
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from mesh_core.system.logs import logger
from mesh_core.transport.zmq_socket import Context, Socket

log = logger(__name__)

_SILENT_S = 30.0
"""A connection that has said nothing for so long is closed: a host says that it is there when it has shaken hands."""

_LOOK_MS = 1000
_WATCHED = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_MONITOR_STOPPED


@dataclass(frozen=True)
class DoorLimits:
    """How many connections there are at most.

    Attributes:
        silent: that have not said anything, and so perhaps not proven a key.
        of_address: of these, from one address.
        of_key: of one key.
        together: that have spoken; the rest of what the process may open is for its files and its own calls.
    """

    silent: int
    of_address: int
    of_key: int
    together: int

    @staticmethod
    def within(open_files: int) -> DoorLimits:
        """For a process that may have so many files and connections open."""
        return DoorLimits(
            min(256, open_files // 4), min(64, open_files // 8), min(128, open_files // 4), open_files // 2
        )


@dataclass
class _Connection:
    """One, by its descriptor.

    Attributes:
        seen: libzmq has told of it, which may be after it spoke.
        peer: address and port; () before it was looked at.
        key: None before it spoke.
    """

    seen: bool = False
    peer: tuple[Any, ...] = ()
    key: str | None = None
    since: float = field(default_factory=monotonic)

    @property
    def address(self) -> str:
        return str(self.peer[0]) if self.peer else ""


class Doors:
    """Watches the connections of ``bound`` in a thread of its own, which ends when the socket's monitor is off.

    Args:
        bound: a socket that is bound.
        port: where.
    """

    def __init__(self, context: Context, bound: Socket, port: int, limits: DoorLimits) -> None:
        self._port, self._limits = port, limits
        self._connections: dict[int, _Connection] = {}
        self._of_key: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._unbound = threading.Event()
        self._hand = _Hand()
        where = f"inproc://mesh.doors.{token_hex(8)}"
        bound.monitor(where, _WATCHED)
        self._monitor: Socket = context.socket(zmq.PAIR)
        self._monitor.rcvhwm = 0  # Full, it would stop libzmq's own thread.
        self._monitor.connect(where)
        self._thread = threading.Thread(target=self._watch, name="doors", daemon=True)
        self._thread.start()

    def spoke(self, descriptor: int, key: str) -> bool:
        """A message came over a connection, from whoever proved ``key`` ("": nobody does); false if it is one too many.

        Called for every message, by one thread.
        """
        known = self._connections.get(descriptor)
        if known is not None and known.key == key:
            return True
        with self._lock:
            connection = self._connections.setdefault(descriptor, _Connection())
            self._forget_key(connection)
            if (key and self._of_key[key] >= self._limits.of_key) or self._of_key.total() >= self._limits.together:
                log.warning("closed a connection of %s, which has %d others", key or "a peer", self._of_key[key])
                connection.peer = connection.peer or self._hand.peer(descriptor, self._port)
                self._hand.close_connection(descriptor, connection.peer)
                return False
            connection.key = key
            self._of_key[key] += 1
            return True

    def wait_unbound(self, seconds: float) -> None:
        """Return when the address that is being freed is free."""
        self._unbound.wait(seconds)

    def join(self) -> None:
        """Return when the thread has ended; the socket's monitor must be off."""
        self._thread.join()

    def _watch(self) -> None:
        watching = True
        while watching:
            try:
                watching = self._monitor.poll(_LOOK_MS) == 0 or self._take_all()
                with self._lock:
                    self._close_excess()
            except zmq.ZMQError as error:  # The context ends.
                log.debug("connections are not watched any more: %s", error)
                watching = False
            except Exception:
                log.exception("connections could not be counted")
        self._monitor.close(linger=0)
        with self._lock:
            self._hand.drop()

    def _take_all(self) -> bool:
        """Take what has happened; false when nothing more will."""
        while self._monitor.poll(0):
            told = parse_monitor_message(self._monitor.recv_multipart())
            event, descriptor = told["event"], told["value"]
            if event == zmq.EVENT_MONITOR_STOPPED:
                return False
            if event == zmq.EVENT_CLOSED:
                self._unbound.set()
                continue
            with self._lock:
                known = self._connections.get(descriptor)
                if event == zmq.EVENT_DISCONNECTED or (known is not None and known.seen):
                    self._drop(descriptor)
                if event == zmq.EVENT_ACCEPTED:
                    self._connections.setdefault(descriptor, _Connection()).seen = True
        return True

    def _drop(self, descriptor: int) -> None:
        gone = self._connections.pop(descriptor, None)
        if gone is not None:
            self._forget_key(gone)

    def _forget_key(self, connection: _Connection) -> None:
        if connection.key is not None:
            self._of_key[connection.key] -= 1
            self._of_key += Counter()  # without those of which there are none
            connection.key = None

    def _close_excess(self) -> None:
        """Close connections that have said nothing: those of long ago, and the oldest of whoever has too many."""
        silent = {d: c for d, c in self._connections.items() if c.key is None}
        for descriptor, connection in silent.items():
            connection.peer = connection.peer or self._hand.peer(descriptor, self._port)
        of_address = Counter(c.address for c in silent.values())
        long_ago, too_many = monotonic() - _SILENT_S, len(silent) - self._limits.silent
        for descriptor, connection in silent.items():  # the oldest first
            has = of_address[connection.address]
            greedy = has > self._limits.of_address or (too_many > 0 and has == max(of_address.values()))
            if greedy or connection.since < long_ago:
                of_address[connection.address] -= 1
                too_many -= 1
                self._hand.close_connection(descriptor, connection.peer)
                self._drop(descriptor)


class _Hand:
    """Reaches for connections that are libzmq's own, and that it may close at any time, whereupon another file gets the
    same descriptor: so through a second descriptor. The place of that one is kept: there may be no other left."""

    def __init__(self) -> None:
        self._kept = () if sys.platform == "win32" else tuple(os.open(os.devnull, os.O_RDONLY) for _ in range(2))

    def peer(self, descriptor: int, port: int) -> tuple[Any, ...]:
        """Address and port of who connected to ``port``; () if it is gone."""
        try:
            with self._reached(descriptor) as end:
                return tuple(end.getpeername()) if end.getsockname()[1] == port else ()
        except OSError:
            return ()

    def close_connection(self, descriptor: int, peer: tuple[Any, ...]) -> None:
        """Break off the connection with ``peer``; libzmq sees that and forgets it."""
        with suppress(OSError), self._reached(descriptor) as end:
            if tuple(end.getpeername()) == peer:
                end.shutdown(socket.SHUT_RDWR)

    def drop(self) -> None:
        """Free the places; it is of no use any more."""
        for kept in self._kept:
            os.close(kept)
        self._kept = ()

    @contextmanager
    def _reached(self, descriptor: int) -> Iterator[socket.socket]:
        # Of this family, so that there is room for addresses of either.
        family, kind = socket.AF_INET6, socket.SOCK_STREAM
        if sys.platform == "win32":
            with socket.fromfd(descriptor, family, kind) as end:
                yield end
            return
        nothing, place = self._kept or (-1, -1)
        os.dup2(descriptor, place, inheritable=False)
        end = socket.socket(family, kind, 0, fileno=place)
        try:
            yield end
        finally:
            end.detach()
            os.dup2(nothing, place, inheritable=False)
