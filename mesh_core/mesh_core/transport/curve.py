"""CURVE: making key pairs, and the ZAP handler that asks listeners which public keys they let in.

Knows sockets and keys, not where keys are kept.
"""

from __future__ import annotations

import threading
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable

import zmq
from zmq.utils import z85

from mesh_core.system.logs import logger

log = logger(__name__)

KEY_LENGTH = 40
"""Characters of a key as Z85 text; 32 bytes."""

MayConnect = Callable[[str], bool]
"""Whether a public key (Z85 text) may shake hands. Called in the ZAP thread."""

_ZAP = "inproc://zeromq.zap.01"


def available() -> bool:
    """Whether this machine's libzmq was built with CURVE."""
    return bool(zmq.has("curve"))


def new_key_pair() -> tuple[str, str]:
    """A new public key and its secret key, as Z85 text."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def public_of(secret: str) -> str:
    """The public key that belongs to a secret key.

    Raises:
        ValueError: ``secret`` is no key.
    """
    if len(secret) != KEY_LENGTH:
        raise ValueError(f"a key has {KEY_LENGTH} characters, not {len(secret)}")
    try:
        return zmq.curve_public(secret.encode()).decode()
    except (zmq.ZMQError, UnicodeError) as error:
        raise ValueError("not a key") from error


def url_text(key: str) -> str:
    """A key (Z85) in letters, digits, ``-`` and ``_`` alone, for addresses and command lines."""
    return urlsafe_b64encode(z85.decode(key.encode())).decode().rstrip("=")


def from_url_text(text: str) -> str:
    """The key (Z85) that `url_text` wrote.

    Raises:
        ValueError: ``text`` is no key.
    """
    raw = urlsafe_b64decode(text.encode("ascii") + b"=")
    if len(raw) != 32 or urlsafe_b64encode(raw).decode().rstrip("=") != text:
        raise ValueError("a key is 43 letters, digits, - and _")
    return z85.encode(raw).decode()


class ZapHandler:
    """Answers libzmq's question, for all listeners of one context, whether a client may come in.

    A listener's socket has a ZAP domain of its own; a domain that is not added lets nobody in.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._asked: dict[str, MayConnect] = {}
        self._socket = context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.bind(_ZAP)
        self._stop = context.socket(zmq.PAIR)
        self._stop.bind("inproc://mesh.zap.stop")
        self._stopper = context.socket(zmq.PAIR)
        self._stopper.connect("inproc://mesh.zap.stop")
        self._thread = threading.Thread(target=self._serve, name="zap", daemon=True)
        self._thread.start()

    def add(self, domain: str, may_connect: MayConnect) -> None:
        """Ask ``may_connect`` about clients of the listener whose socket has that ZAP domain."""
        self._asked[domain] = may_connect

    def remove(self, domain: str) -> None:
        """Let nobody into that domain any more; no error if it is not there."""
        self._asked.pop(domain, None)

    def close(self) -> None:
        """Stop answering; handshakes under way fail."""
        self._stopper.send(b"")
        self._thread.join()
        for socket in (self._stopper, self._stop, self._socket):
            socket.close(linger=0)

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._stop, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._stop in ready:
                return
            request = self._socket.recv_multipart()
            # RFC 27: route, "", version, request id, domain, address, identity, mechanism, credentials...
            route, request_id = request[:2], request[3]
            self._socket.send_multipart([*route, b"1.0", request_id, *self._answer(request[4:]), b""])

    def _answer(self, request: list[bytes]) -> tuple[bytes, bytes, bytes]:
        """Status code, text and user id: the key that was proven."""
        try:
            domain, address, _, _, key = request
            may_connect = self._asked.get(domain.decode())
            if may_connect is None:
                # Its listener is closing: to the client that is a worker that ends, not one that refuses it.
                return b"300", b"Closing", b""
            text = z85.encode(key).decode()
            if may_connect(text):
                return b"200", b"OK", text.encode()
            log.warning("refused the unknown key %s from %s", text, address.decode(errors="replace"))
        except Exception:
            # The handler must outlive anything: without it nobody could connect any more.
            log.exception("a handshake was refused because its key could not be checked")
            return b"500", b"Not checked", b""
        return b"400", b"Not authorised", b""
