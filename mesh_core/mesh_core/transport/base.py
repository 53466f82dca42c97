"""What a transport is: it moves multi-frame messages between a host's channel and a worker's listener.

Knows nothing of what the frames mean. A frame is bytes or a view of memory; frame 0 is small (a header), the rest
may be tens of megabytes. Channels and listeners belong to one thread each, but for `Listener.send` and
`Listener.wake`, which any thread may call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from mesh_core.errors import NotAuthorised

__all__ = ["Address", "Channel", "Frame", "Frames", "Listener", "Peer", "Transport", "Trust"]

Trust = Literal["member", "enrolling", "neighbour"]
Frame = bytes | bytearray | memoryview
Frames = Sequence[Frame]


@dataclass(frozen=True)
class Peer:
    """Who sent a message.

    Attributes:
        route: opaque; where an answer goes.
        key: the proven public key of the peer (Z85 text), or "" on transports without keys.
        trust: ``member``: may do everything; ``enrolling``: came in on a one-time invite, may only enrol;
            ``neighbour``: another worker, admitted for sessions that its host named.
    """

    route: bytes
    key: str = ""
    trust: Trust = "member"


@dataclass(frozen=True)
class Address:
    """Where a worker listens, and the key that it must prove.

    ``text`` is what people write, ``scheme://place``; ``server_key`` is Z85 text, "" where there is none.
    """

    text: str
    server_key: str = ""

    @property
    def scheme(self) -> str:
        return self.text.partition("://")[0]


class Channel(ABC):
    """The host's end of a connection to one worker. Used from one thread at a time."""

    @abstractmethod
    def send(self, frames: Frames) -> None:
        """Send one message. The frames' memory must not change until it is delivered; a transport that queues
        holds references to them.

        Raises:
            PeerLost: the connection is known to be gone, or its queue stays full. A channel is one connection:
                it does not come back, open another.
            WireTooLarge: a frame over the limit; nothing was sent.
        """

    @abstractmethod
    def receive(self, timeout: float) -> list[memoryview] | None:
        """The next message, or None when nothing came within ``timeout`` seconds. The views stay valid for as
        long as they are referenced.

        Raises:
            NotAuthorised: the worker refuses our key from now on.
            PeerLost: the connection is gone, and all that came before is received.
        """

    @abstractmethod
    def close(self) -> None:
        """Drop the connection and what is still queued. May be called twice."""


class Listener(ABC):
    """A worker's end: messages of many peers."""

    address: str
    """Where it listens, as a host would write it; the port is filled in when it was 0."""

    @abstractmethod
    def receive(self, timeout: float) -> tuple[Peer, list[memoryview]] | None:
        """The next message and who sent it, or None after ``timeout`` seconds or a `wake`."""

    @abstractmethod
    def send(self, route: bytes, frames: Frames) -> None:
        """Answer a peer; dropped silently when the peer is gone. Any thread may call it.

        Raises:
            WireTooLarge: a frame over the limit.
        """

    @abstractmethod
    def wake(self) -> None:
        """Make a waiting `receive` return None now. Any thread may call it."""

    def admit(self, key: str) -> None:  # noqa: B027  (without keys there is nobody to refuse)
        """Let a neighbouring worker in with this public key. Any thread may call it."""

    def dismiss(self, key: str) -> None:  # noqa: B027
        """Take an `admit` back; no error if there was none. Any thread may call it."""

    def enrol(self, peer: Peer, key: str, name: str) -> None:
        """Make ``key`` a member for good, and the invite that ``peer`` came in on useless.

        Raises:
            NotAuthorised: the peer did not come in on an invite, or another used it first.
        """
        raise NotAuthorised("This transport knows no invites: whoever reaches it is a member.")

    @abstractmethod
    def close(self) -> None:
        """Stop listening. May be called twice."""


class Transport(ABC):
    """A way to reach workers, chosen by the scheme of the address. One instance per process."""

    scheme: ClassVar[str]

    def resolve(self, address: Address) -> Address:
        """``address`` with the key that its worker must prove, where this user knows it: what another worker needs to
        connect there in turn.

        Raises:
            ConfigError: the text is no address of this transport, or the key is needed and not known.
        """
        return address

    @abstractmethod
    def connect(self, address: Address, timeout: float) -> Channel:
        """Open a channel. Returns once the worker can be talked to.

        Raises:
            Unreachable: nobody listens there within ``timeout`` seconds.
            NotAuthorised: the worker refused our key, or is not the one that we know.
            ConfigError: the address cannot be read, or names a worker whose key is not known.
        """

    @abstractmethod
    def listen(self, address: str, **options: object) -> Listener:
        """Listen at ``address``.

        Raises:
            TransportError: the address is taken or is not this machine's.
            ConfigError: an option that this transport does not have, or an unsafe combination.
        """

    @abstractmethod
    def wait(self, channels: Sequence[Channel], timeout: float) -> list[Channel]:
        """Those of ``channels`` (all of this transport) whose `Channel.receive` has something to return or raise;
        empty after ``timeout`` seconds."""
