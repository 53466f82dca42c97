"""The loop that `benchmarks.step` compares with: the same processes and bytes over bare ZeroMQ, and nothing else.

A message is a small frame and a large one, sent without copies; CURVE, where it is on, takes
any client key. Knows nothing of the mesh.
"""

from __future__ import annotations

from contextlib import suppress
from types import TracebackType

import zmq

_HOST = b"host"
_STOP = b"stop"
_HELLO = b"hello"
_PATIENCE_MS = 60_000
"""A ring that has stood still for so long has lost an end."""

Keys = tuple[str, str] | None
"""Public and secret key of the ends that listen, or None for no encryption."""


def new_keys() -> tuple[str, str]:
    """A CURVE key pair, public and secret, in Z85."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


class BareNode:
    """One end that hands on: to the node at ``following``, or back to the host if that is None."""

    def __init__(self, keys: Keys) -> None:
        self._context, self._keys = zmq.Context[zmq.Socket[bytes]](), keys
        self._router = self._context.socket(zmq.ROUTER)
        self._router.linger = 0
        if keys is not None:
            self._router.curve_server = 1
            self._router.curve_secretkey = keys[1].encode()
        self.port = self._router.bind_to_random_port("tcp://127.0.0.1")

    def run(self, following: int | None) -> None:
        """Until the host says stop, or nobody says anything."""
        onward = _dealer(self._context, following, self._keys) if following is not None else None
        while self._router.poll(_PATIENCE_MS):
            _, head, *rest = self._router.recv_multipart(copy=False)
            if head.bytes == _STOP:
                break
            if head.bytes != _HELLO and onward is not None:
                onward.send_multipart([head, *rest], copy=False)
            elif head.bytes != _HELLO:
                self._router.send_multipart([_HOST, head, *rest], copy=False)
        self._context.destroy(linger=0)


class BareRing:
    """The host's end of a ring through the nodes at ``ports``."""

    def __init__(self, ports: list[int], keys: Keys) -> None:
        self._context = zmq.Context[zmq.Socket[bytes]]()
        self._ends = [_dealer(self._context, port, keys, _HOST) for port in ports]
        for end in self._ends:
            end.send_multipart([_HELLO])

    def turn(self, payload: memoryview) -> memoryview:
        """``payload`` once around the ring.

        Raises:
            zmq.Again: an end is lost.
        """
        self._ends[0].send_multipart([b"step", payload], copy=False)
        if not self._ends[-1].poll(_PATIENCE_MS):
            raise zmq.Again
        return self._ends[-1].recv_multipart(copy=False)[1].buffer

    def __enter__(self) -> BareRing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for end in self._ends:
            with suppress(zmq.Again):
                end.send_multipart([_STOP], zmq.NOBLOCK)
        self._context.destroy(linger=200)


def _dealer(context: zmq.Context[zmq.Socket[bytes]], port: int, keys: Keys, name: bytes = b"") -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    if name:
        socket.routing_id = name
    if keys is not None:
        public, secret = zmq.curve_keypair()
        socket.curve_publickey, socket.curve_secretkey = public, secret
        socket.curve_serverkey = keys[0].encode()
    socket.connect(f"tcp://127.0.0.1:{port}")
    return socket
