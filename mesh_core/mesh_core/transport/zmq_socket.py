"""Sockets with the mesh's options, and messages on them without needless copies.

An encrypted connection carries a frame in pieces of `PIECE` bytes and a shorter last one: so encrypting, sending and
decrypting overlap, and a stranger cannot make a worker set memory aside for a large frame before it has proven its
key. An unencrypted one carries frames whole.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from math import ceil
from typing import Any

import zmq

from mesh_core.errors import PeerLost
from mesh_core.wire.limits import MessageLimits

Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]

PIECE = 1 << 20
"""Bytes of a piece. A part of exactly this size is continued by the next part, any shorter one ends its frame."""

_ENCRYPTION = 64
"""Bytes, rounded up, that encryption adds to a part (RFC 26: 33)."""

LINGER_MS = 500
"""For what was sent just before a socket was closed, such as the end of a session. And libzmq may end the whole process
where a connection breaks within a message of several parts while its socket, without any linger, is being closed."""

_ALIGNMENT = 64
"""Bytes; torch allocates so."""

_ZERO_COPY = 64 << 10
"""Parts of at least so many bytes are sent from their own memory; for smaller ones a copy is cheaper."""

_REQUESTS = 64
"""Requests that wait at most per connection; then the host's send waits. A session has one step under way."""

_REPLIES = 4
"""Messages that wait at most where it is limited what may come."""

_ANSWERS = 1000
"""Answers that wait at most per peer. A worker does not wait for one host of many: for one that takes nothing any
more, and that has not been noticed as gone, the rest is dropped."""

_HANDSHAKE_MS = 5000
"""A stranger must not hold a connection for longer."""

_KEEPALIVE_S = (10, 5, 3)
"""Idle time, interval and count: NAT routers forget silent connections, and a dead peer's are freed."""


HERE = [memoryview(b"")]
"""What a host says first: so a worker knows which of its connections have done the handshake, and whose they are."""


class Wire:
    """How messages cross one kind of connection.

    Args:
        limits: for frames.
        encrypted: whether frames cross in pieces.
        replies: for what comes, where that may be less; None for ``limits``.

    Attributes:
        accepted: the limits for what comes.
    """

    def __init__(self, limits: MessageLimits, *, encrypted: bool, replies: MessageLimits | None = None) -> None:
        self.limits, self._replies = limits, replies
        self.accepted = replies or limits
        self._piece = PIECE if encrypted else limits.buffer + 1
        self._largest_part = PIECE + _ENCRYPTION if encrypted else limits.buffer

    def socket(self, context: Context, kind: int) -> Socket:
        """A TCP socket of type ``kind``, not yet bound or connected."""
        socket: Socket = context.socket(kind)
        socket.linger = LINGER_MS
        socket.maxmsgsize = self._largest_part
        socket.rcvhwm = _REQUESTS
        if self._replies is not None:
            socket.maxmsgsize = min(self._largest_part, self._replies.message + _ENCRYPTION)
            socket.rcvhwm = _REPLIES
        socket.sndhwm = _ANSWERS if kind == zmq.ROUTER else _REQUESTS
        socket.handshake_ivl = _HANDSHAKE_MS
        socket.tcp_keepalive = 1
        socket.tcp_keepalive_idle, socket.tcp_keepalive_intvl, socket.tcp_keepalive_cnt = _KEEPALIVE_S
        return socket

    def send(self, socket: Socket, frames: Sequence[memoryview]) -> None:
        """Queue one message; does not wait. Large frames must not change until they are delivered."""
        parts = [part for frame in frames for part in self._pieces(frame)]
        last = len(parts) - 1
        for index, part in enumerate(parts):
            flags = zmq.NOBLOCK | (zmq.SNDMORE if index < last else 0)
            socket.send(part, flags, copy=part.nbytes < _ZERO_COPY)

    def receive(self, socket: Socket, limits: MessageLimits | None = None) -> list[memoryview]:
        """The frames of the next message, which must be there.

        What is over ``limits`` (by default those of the connection) is dropped on the way, but for one frame, so that
        the message is still refused by whoever reads it.

        Raises:
            PeerLost: it is over the limits for replies; the rest of it still waits, and the connection is of no use.
        """
        limits = limits or self._replies or self.limits
        frames: list[memoryview] = []
        pieces: list[memoryview] = []
        size, more = 0, True
        while more:
            part = socket.recv(zmq.NOBLOCK, copy=False)
            more = part.more
            size += len(part)
            first = not (frames or pieces)
            if first or (len(frames) < limits.buffers + 2 and size <= limits.message):
                pieces.append(part.buffer)
                if len(part) < self._piece or not more:
                    frames.append(pieces[0] if len(pieces) == 1 else _joined(pieces))
                    pieces = []
            elif self._replies is not None:
                raise PeerLost("The other end sends more than may come back.")
        return frames

    def _pieces(self, frame: memoryview) -> list[memoryview]:
        if frame.nbytes < self._piece:
            return [frame]
        return [frame[start : start + self._piece] for start in range(0, frame.nbytes + 1, self._piece)]


def _joined(pieces: Sequence[memoryview]) -> memoryview:
    """A frame from its pieces, where it lies in memory as tensors do: whoever reads one there need not copy it."""
    size = sum(piece.nbytes for piece in pieces)
    room = bytearray(size + _ALIGNMENT)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(room)) % _ALIGNMENT
    frame = memoryview(room)[start : start + size]
    position = 0
    for piece in pieces:
        frame[position : position + piece.nbytes] = piece
        position += piece.nbytes
    return frame


def close_with(owner: Any, *sockets: Socket) -> None:
    """Close ``sockets`` at the latest when ``owner``, which must not be what they refer to, is garbage.

    Ending a context waits for ever for a socket that nobody can close any more.
    """
    # Not at exit: other threads may still use sockets then, and the process frees all of it.
    weakref.finalize(owner, _close, sockets).atexit = False


def _close(sockets: Sequence[Socket]) -> None:
    for socket in sockets:
        socket.close(linger=LINGER_MS)


def milliseconds(seconds: float) -> int:
    """``seconds`` for a poll; rounded up, so that the end of a wait is not spent polling."""
    return max(0, ceil(seconds * 1e3))
