"""What a transport is: it moves multi-frame messages between a host's channel and a worker's listener.

Knows nothing of what the frames mean. A message is one frame or more. A frame is contiguous memory; frame 0 is a header
of at most 1 MiB, each of the others may be empty or have tens of megabytes, 4 GiB at most, 256 of them.

Delivery: the messages of one sender arrive whole, in their order, and each once. A message that will not arrive shows
as `PeerLost` at the channel, never as a gap; but answers to a peer that takes nothing any more may be dropped. A
transport repeats nothing and does not reconnect: the core does.

Threads: a channel is used by one thread at a time, and so is a listener, but for the methods that say otherwise. No
method may wait longer than the timeout that it is given; without one, `Channel.send` alone may wait for a few seconds.

A host opens two channels to each worker: one for its requests, one that only asks whether the worker is alive, which is
answered while the first one carries tens of megabytes. `mesh_core.testing` has what a transport must pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from mesh_core.errors import NotAuthorised, WireMalformed
from mesh_core.transport.address import with_scheme
from mesh_core.wire.framing import Frame
from mesh_core.wire.limits import MessageLimits

__all__ = ["Address", "Channel", "Frame", "Frames", "Listener", "Peer", "Transport", "Trust", "UnfitMessage"]

Trust = Literal["member", "enrolling", "neighbour"]
"""How far a peer is trusted, see `Peer`."""

Frames = Sequence[Frame]
"""A message."""


@dataclass(frozen=True)
class Peer:
    """Who sent a message.

    Attributes:
        route: where an answer goes; opaque, and no other peer's for as long as the listener lives.
        key: the proven public key of the peer (Z85 text), or "" on transports without keys.
        near: the same user's as this process, on this machine, and both have proven it.
        trust: ``member``: may do everything; ``enrolling``: came in on a one-time invite, may only enrol;
            ``neighbour``: another worker, admitted for sessions that its host named.
    """

    route: bytes
    key: str = ""
    trust: Trust = "member"
    near: bool = False


@dataclass(frozen=True)
class Address:
    """Where a worker listens, and the key that it must prove.

    Attributes:
        text: ``scheme://place``, made of what people write (`with_scheme`); what a place is, the transport decides.
        server_key: Z85 text; "" on transports without keys, or to take the key that this user knows.
    """

    text: str
    server_key: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", with_scheme(self.text))

    @property
    def scheme(self) -> str:
        """Which transport serves it, see `Transport.scheme`."""
        return self.text.partition("://")[0]


class UnfitMessage(Exception):
    """A listener got a message that it cannot hand out. Its peer is to be told.

    Attributes:
        peer: who sent it.
        error: why.
    """

    def __init__(self, peer: Peer, error: WireMalformed) -> None:
        self.peer, self.error = peer, error
        super().__init__(error.message)


class Channel(ABC):
    """The host's end of one connection to one worker. When the connection is gone, the channel is over."""

    @property
    def way(self) -> str:
        """What people call the way between processes of one user on one machine, once both have proven that; else
        empty."""
        return ""

    @abstractmethod
    def send(self, frames: Frames) -> None:
        """Send one message. Returns when it is queued, which may be before it is sent.

        The frames' memory does not change until the message is delivered: a transport that queues keeps references
        to it and need not copy.

        Raises:
            PeerLost: the connection is known to be gone, or its queue stays full.
            WireTooLarge: a frame over the limit; nothing was sent.
        """

    @abstractmethod
    def receive(self, timeout: float) -> list[memoryview] | None:
        """The next message, or None when nothing came within ``timeout`` seconds (0: do not wait).

        The views are flat and of bytes, and stay valid for as long as they are referenced. One that can be written
        to is the receiver's alone.

        Raises:
            NotAuthorised: the worker refuses our key from now on.
            PeerLost: the connection is gone, and all that came before is received.
        """

    @abstractmethod
    def close(self) -> None:
        """Drop the connection; what is still queued may be lost. May be called twice; afterwards the other methods
        raise `PeerLost`."""


class Listener(ABC):
    """A worker's end: messages of many peers.

    A transport without keys leaves `admit`, `dismiss` and `enrol` as they are, and makes everybody a member.
    """

    address: str
    """Where it listens, as a host would write it; the port is filled in when it was 0."""

    @abstractmethod
    def receive(self, timeout: float) -> tuple[Peer, list[memoryview]] | None:
        """The next message and who sent it, or None after ``timeout`` seconds or a `wake`; views as in
        `Channel.receive`. A peer that may do nothing at all is never handed out.

        Raises:
            UnfitMessage: one came that is not as this transport's messages are; the next ones are good.
        """

    @abstractmethod
    def send(self, route: bytes, frames: Frames) -> None:
        """Answer a peer; dropped silently when the peer is gone. Any thread may call it, and it does not wait.

        Answers of one thread keep their order. The frames' memory is used as by `Channel.send`.

        Raises:
            WireTooLarge: a frame over the limit.
        """

    @abstractmethod
    def wake(self) -> None:
        """Make a waiting `receive` return None now, or the next one if none waits. Any thread may call it."""

    def admit(self, key: str) -> None:  # noqa: B027  (without keys there is nobody to refuse)
        """Let a neighbouring worker in with this public key. Any thread may call it."""

    def dismiss(self, key: str) -> None:  # noqa: B027
        """Take an `admit` back; no error if there was none. Any thread may call it."""

    def enrol(self, peer: Peer, key: str, name: str) -> None:
        """Make ``key`` a member for good under ``name``, and the invite that ``peer`` came in on useless.

        Raises:
            NotAuthorised: the peer did not come in on an invite, or another used it first.
        """
        raise NotAuthorised("This transport knows no invites: whoever reaches it is a member.")

    @abstractmethod
    def close(self) -> None:
        """Stop listening and free the address before it returns; every channel is lost. May be called twice, by the
        thread that receives."""


class Transport(ABC):
    """A way to reach workers. One instance per process, which any thread may use."""

    scheme: ClassVar[str]
    """What is before ``://`` in the addresses that it serves; no other transport's."""

    def resolve(self, address: Address) -> Address:
        """``address`` with the key that its worker must prove, where this user knows it: what another worker needs to
        connect there in turn.

        Raises:
            ConfigError: the text is no address of this transport, or the key is needed and not known.
        """
        return address

    @abstractmethod
    def connect(self, address: Address, timeout: float) -> Channel:
        """Open a channel. Returns once the worker can be talked to, and both ends have proven their keys where there
        are keys; a worker that starts within ``timeout`` seconds is waited for.

        Raises:
            Unreachable: nobody listens there within ``timeout`` seconds.
            NotAuthorised: the worker refused our key, or is not the one that we know.
            ConfigError: the address cannot be read, or names a worker whose key is not known.
        """

    def connect_onward(self, address: Address, timeout: float, replies: MessageLimits) -> Channel:
        """`connect` to the next worker of a chain, which a host has named and nobody here vouches for.

        Args:
            replies: of what may come back. A transport that can keeps memory for a few such messages at most, and the
                channel is lost with the first larger one; others leave this method as it is.
        """
        return self.connect(address, timeout)

    @abstractmethod
    def listen(self, address: str, **options: object) -> Listener:
        """Listen at ``address``; `Listener.address` says where, if the address leaves it open (port 0).

        Args:
            options: this transport's own. ``mesh serve`` gives ``insecure`` and ``force``, as true, where the user
                asked for no encryption.

        Raises:
            TransportError: the address is taken or is not this machine's.
            ConfigError: an option that this transport does not have, or an unsafe combination.
        """

    @abstractmethod
    def wait(self, channels: Sequence[Channel], timeout: float) -> list[Channel]:
        """Those of ``channels`` (all of this transport) whose `Channel.receive` has something to return or raise.

        Waits until there is one; empty after ``timeout`` seconds.
        """
