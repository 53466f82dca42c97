"""A host's connection to one worker over ZeroMQ: a DEALER socket, and its monitor, which tells when it is gone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from secrets import token_bytes
from time import monotonic

import zmq
from zmq.utils.monitor import parse_monitor_message

from mesh_core.errors import NotAuthorised, PeerLost, Unreachable, WireMalformed
from mesh_core.transport.address import Place
from mesh_core.transport.base import Channel
from mesh_core.transport.frames import byte_views
from mesh_core.transport.keys import KeyPair
from mesh_core.transport.memory_link import NAME, MemoryOffer, offer
from mesh_core.transport.zmq_errors import mapped_errors
from mesh_core.transport.zmq_refusals import HandshakeBroken, not_accepted
from mesh_core.transport.zmq_socket import HERE, Context, Socket, Wire, close_with, milliseconds
from mesh_core.wire.framing import Frame

_FULL = 5.0
"""Seconds that a send waits for a queue that is full."""

_NOT_ACCEPTED = 400
"""What a ZAP handler says of a key (RFC 27)."""

_FAILED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_GONE = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
_WATCHED = zmq.EVENT_HANDSHAKE_SUCCEEDED | _FAILED | _GONE


class ZmqChannel(Channel):
    """Connected once, by `open_channel`; when the connection is gone the channel is over.

    Args:
        place: of the worker, for messages.
        wire: how messages cross; the same at both ends.
        keeper: kept alive for as long as the channel, so that the context stays.
    """

    def __init__(self, context: Context, place: Place, wire: Wire, keeper: object) -> None:
        self._place, self._wire, self._keeper = place, wire, keeper
        self._lost = ""
        self._memory: MemoryOffer | None = None
        self._taken: list[memoryview] | None = None
        self.socket = wire.socket(context, zmq.DEALER)
        self.socket.routing_id = b"h" + token_bytes(15)
        self.socket.reconnect_ivl = -1
        watch = f"inproc://mesh.monitor.{token_bytes(8).hex()}"
        self.socket.monitor(watch, _WATCHED)
        self.monitor: Socket = context.socket(zmq.PAIR)
        self.monitor.linger = 0
        self.monitor.connect(watch)
        close_with(self, self.socket, self.monitor)
        self._poller = zmq.Poller()
        self._poller.register(self.socket, zmq.POLLIN)
        self._poller.register(self.monitor, zmq.POLLIN)

    def send(self, frames: Sequence[Frame]) -> None:
        views = byte_views(frames, self._wire.limits)
        self._raise_if_lost()
        with mapped_errors(f"Sending to {self._place}"):
            if not self.socket.poll(0, zmq.POLLOUT):
                self._wait_for_room()
            try:
                link = self._memory.link if self._memory is not None else None
                self._wire.send(self.socket, views if link is None else link.outgoing(views))
            except BaseException:
                # Ctrl-C may have left half a message, which the next one would be taken to continue.
                self._lost = "sending was interrupted"
                raise

    def receive(self, timeout: float) -> list[memoryview] | None:
        deadline = monotonic() + timeout
        with mapped_errors(f"Receiving from {self._place}"):
            while True:
                frames = self.take()
                if frames is not None:
                    return self._checked(frames)
                self._raise_if_lost()
                left = deadline - monotonic()
                if not self._poller.poll(milliseconds(left)) and left <= 0:
                    return None

    def take(self) -> list[memoryview] | None:
        """A message that is already here, or None."""
        if self._taken is not None:
            frames, self._taken = self._taken, None
            return frames
        if self.socket.closed or not self.socket.poll(0):
            return None
        try:
            frames = self._wire.receive(self.socket)
            if self._memory is None or _refusal(frames):
                return frames
            if self._memory.waiting:
                self._memory.answered(frames)
                return self.take()
            return self._memory.link.incoming(frames, self._wire.accepted) if self._memory.link else frames
        except PeerLost as error:
            self._lost = error.message
            self.close()
            raise
        except WireMalformed as error:
            self._lost = f"it lies about the memory that is shared: {error.message}"
            self.close()
            self._raise_if_lost()
            raise

    def share(self, memory: MemoryOffer) -> None:
        """Offer the worker memory; before anything else is sent."""
        self._memory = memory
        self._wire.send(self.socket, memory.frames)

    @property
    def way(self) -> str:
        return NAME if self._memory is not None and self._memory.link is not None else ""

    def ready(self) -> bool:
        """Whether `receive` would not wait."""
        if self._memory is not None and self._memory.waiting and not self.socket.closed and self.socket.poll(0):
            with suppress(PeerLost):  # receive() raises it
                self._taken = self.take()
        return bool(self._taken is not None or self.socket.closed or self.socket.poll(0) or self._is_lost())

    def close(self) -> None:
        self._lost = self._lost or "the channel was closed here"
        if not self.socket.closed:
            self.socket.disable_monitor()
            self.monitor.close(linger=0)
            self.socket.close()
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _checked(self, frames: list[memoryview]) -> list[memoryview]:
        if _refusal(frames):
            raise NotAuthorised(
                f"The worker at {self._place} does not accept this user's key any more.",
                hint="a new invite from the worker's owner, then mesh join INVITE",
            )
        return frames

    def _wait_for_room(self) -> None:
        deadline = monotonic() + _FULL
        while not self.socket.poll(100, zmq.POLLOUT):
            self._raise_if_lost()
            if monotonic() > deadline:
                raise PeerLost(f"The worker at {self._place} has taken nothing for {_FULL:g} s; its queue is full.")

    def _raise_if_lost(self) -> None:
        if self._is_lost():
            raise PeerLost(f"The connection to the worker at {self._place} is gone: {self._lost}.")

    def _is_lost(self) -> bool:
        while not self._lost and self.monitor.poll(0):
            if parse_monitor_message(self.monitor.recv_multipart())["event"] & _GONE:
                self._lost = "it closed the connection"
        return bool(self._lost)

    def shake_hands(self, timeout: float) -> None:
        """Wait until both ends have proven their keys.

        Raises:
            NotAuthorised: the worker has proven its key and refuses ours.
            Unreachable: it does not answer in time.
            HandshakeBroken: the connection ended.
        """
        deadline = monotonic() + timeout
        while (left := deadline - monotonic()) > 0:
            if not self.monitor.poll(milliseconds(left)):
                break
            told = parse_monitor_message(self.monitor.recv_multipart())
            if told["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return
            if told["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH and told["value"] == _NOT_ACCEPTED:
                raise not_accepted(self._place)
            raise HandshakeBroken
        raise Unreachable(
            f"{self._place} takes connections, but does not answer within {max(timeout, 0.1):.1f} s.",
            hint="restart the worker there; it is stopped, or too busy to answer",
        )


def _refusal(frames: list[memoryview]) -> bool:
    """Whether the worker says that it does not accept our key any more."""
    return len(frames) == 1 and frames[0].nbytes == 0


def open_channel(
    context: Context,
    place: Place,
    numeric: str,
    keys: tuple[KeyPair, str] | None,
    *,
    timeout: float,
    wire: Wire,
    keeper: object,
    room: int = 0,
) -> ZmqChannel:
    """A channel whose handshake is done.

    Args:
        numeric: the IP address to connect to.
        keys: our key pair and the worker's public key; None for no encryption.
        room: bytes of memory that the worker is offered to share, for each direction.

    Raises:
        NotAuthorised, Unreachable, HandshakeBroken: as of `ZmqChannel.shake_hands`.
    """
    with mapped_errors(f"Connecting to {place}"):
        channel = ZmqChannel(context, place, wire, keeper)
        try:
            if keys is not None:
                own, server_key = keys
                channel.socket.curve_publickey = own.public.encode()
                channel.socket.curve_secretkey = own.secret.encode()
                channel.socket.curve_serverkey = server_key.encode()
            channel.socket.ipv6 = ":" in numeric
            channel.socket.connect(f"tcp://{f'[{numeric}]' if ':' in numeric else numeric}:{place.port}")
            channel.shake_hands(timeout)
            wire.send(channel.socket, HERE)
            if (memory := offer(room)) is not None:
                channel.share(memory)
        except BaseException:
            channel.close()
            raise
        return channel
