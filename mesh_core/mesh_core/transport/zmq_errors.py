"""Errors of ZeroMQ and of sockets as ours: one context manager, used around every call that can fail."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import zmq

from mesh_core.errors import PeerLost, TransportError, TransportTimeout, Unreachable
from mesh_core.system.handles import EXHAUSTED, EXHAUSTED_HINT

_GONE = frozenset({zmq.ETERM, zmq.ENOTSOCK, zmq.EHOSTUNREACH, zmq.ENOTCONN, zmq.ECONNRESET, zmq.ECONNABORTED})
_NOBODY = frozenset({zmq.ECONNREFUSED, zmq.ENETUNREACH, zmq.ENETDOWN, zmq.ETIMEDOUT})


@contextmanager
def mapped_errors(doing: str) -> Iterator[None]:
    """Turn whatever ZeroMQ or the system raises into a `TransportError`. ``doing`` completes "... failed", for example
    ``"Sending to mesh://a:7777"``."""
    try:
        yield
    except zmq.ZMQBindError as error:
        raise TransportError(f"{doing} failed: {error}.", hint="another port") from error
    except zmq.ZMQBaseError as error:
        number = error.errno if isinstance(error, zmq.ZMQError) else None
        raise _kind(number)(f"{doing} failed: {error or type(error).__name__}.", hint=_hint(number)) from error
    except OSError as error:
        raise TransportError(f"{doing} failed: {error.strerror or error}.", hint=_hint(error.errno)) from error


def _kind(number: int | None) -> type[TransportError]:
    if number in _GONE:
        return PeerLost
    if number in _NOBODY:
        return Unreachable
    return TransportTimeout if number == zmq.EAGAIN else TransportError


def _hint(number: int | None) -> str:
    if number == zmq.EADDRINUSE:
        return "another port (--port), or stop the worker that already listens there"
    if number == zmq.EADDRNOTAVAIL:
        return "an address of this machine, or 0.0.0.0 for all of them"
    if number in EXHAUSTED:
        return EXHAUSTED_HINT
    return "a port above 1024" if number == errno.EACCES else "mesh doctor, to test this machine and the way there"
