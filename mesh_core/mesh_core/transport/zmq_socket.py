"""Sockets with the mesh's options, and messages on them without copies of large frames."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import zmq

from mesh_core.wire.limits import Limits

Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]

ZERO_COPY = 64 << 10
"""Frames of at least so many bytes are sent from their own memory; for smaller ones a copy is cheaper."""

QUEUED_MESSAGES = 64
"""Messages that wait at most per peer and direction. A session has one step under way; the rest is small."""

_HANDSHAKE_MS = 5000
"""A stranger must not hold a connection, or memory for what it sends before it has proven its key, for longer."""

_KEEPALIVE_S = (10, 5, 3)
"""Idle time, interval and count: NAT routers forget silent connections, and a dead peer's are freed."""


def new_socket(context: Context, kind: int, limits: Limits) -> Socket:
    """A TCP socket of type ``kind``, not yet bound or connected."""
    socket: Socket = context.socket(kind)
    socket.linger = 0
    socket.maxmsgsize = limits.buffer
    socket.sndhwm = socket.rcvhwm = QUEUED_MESSAGES
    socket.handshake_ivl = _HANDSHAKE_MS
    socket.tcp_keepalive = 1
    socket.tcp_keepalive_idle, socket.tcp_keepalive_intvl, socket.tcp_keepalive_cnt = _KEEPALIVE_S
    return socket


def milliseconds(seconds: float) -> int:
    """``seconds`` for a poll; rounded up, so that the end of a wait is not spent polling."""
    return max(0, ceil(seconds * 1e3))


def send_frames(socket: Socket, frames: Sequence[memoryview]) -> None:
    """Queue one message; does not wait. Large frames must not change until they are delivered."""
    last = len(frames) - 1
    for index, frame in enumerate(frames):
        flags = zmq.NOBLOCK | (zmq.SNDMORE if index < last else 0)
        socket.send(frame, flags, copy=frame.nbytes < ZERO_COPY)


def receive_frames(socket: Socket, limits: Limits) -> list[zmq.Frame]:
    """The next message, which must be there. Frames past the limit are dropped but for one, so that the reader
    of the message still finds that there were too many."""
    frames: list[zmq.Frame] = []
    more = True
    while more:
        frame = socket.recv(zmq.NOBLOCK, copy=False)
        more = frame.more
        if len(frames) < limits.buffers + 3:
            frames.append(frame)
    return frames
