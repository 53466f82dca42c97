"""Nothing of ZeroMQ's own errors reaches a user."""

from __future__ import annotations

import errno
import inspect

import pytest
import zmq
import zmq.error

from mesh_core.errors import PeerLost, TransportError, TransportTimeout, Unreachable
from mesh_core.transport.zmq_errors import mapped_errors
from mesh_core.wire.failure import describe

CLASSES = [c for _, c in inspect.getmembers(zmq.error, inspect.isclass) if issubclass(c, zmq.ZMQBaseError)]


@pytest.mark.parametrize("number", sorted(zmq.Errno), ids=lambda number: number.name)
def test_every_error_number_becomes_ours(number: zmq.Errno) -> None:
    with pytest.raises(TransportError, match=r"Sending to blue failed: .+") as caught, mapped_errors("Sending to blue"):
        raise zmq.ZMQError(number)
    assert caught.value.hint


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_becomes_ours(kind: type[zmq.ZMQBaseError]) -> None:
    with pytest.raises(TransportError, match=r"Sending to blue failed: .+"), mapped_errors("Sending to blue"):
        raise kind()


@pytest.mark.parametrize(
    ("number", "kind"),
    [(zmq.EAGAIN, TransportTimeout), (zmq.ETERM, PeerLost), (zmq.ENOTSOCK, PeerLost), (zmq.ECONNREFUSED, Unreachable)],
)
def test_those_that_a_caller_tells_apart(number: int, kind: type[TransportError]) -> None:
    with pytest.raises(kind), mapped_errors("x"):
        raise zmq.ZMQError(number)


def test_other_errors_pass() -> None:
    with pytest.raises(KeyError), mapped_errors("x"):
        raise KeyError("x")


@pytest.mark.parametrize("error", [zmq.ZMQError(errno.EMFILE), OSError(errno.EMFILE, "Too many open files")])
def test_a_process_without_files_left_says_so(error: Exception) -> None:
    with pytest.raises(TransportError, match="Too many open files") as caught, mapped_errors("Connecting"):
        raise error
    assert "ulimit" in caught.value.hint
    if isinstance(error, OSError):
        told = describe(error)
        assert told["error"] == "TransportError" and "ulimit" in told["hint"] and not told["traceback"]
