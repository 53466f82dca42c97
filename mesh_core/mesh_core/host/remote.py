"""One worker as a host sees it: a connection, what the worker said of itself, and waiting for its answers.

Waiting sends pings, so a worker that is slow is told from one that is gone, and from one that was restarted and
no longer knows the session. Pings have a connection of their own: behind a state that takes long to cross a slow
link, they would make a worker that is well look lost.
"""

from __future__ import annotations

import platform
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import monotonic
from typing import TypeVar

from mesh_core import __version__, wire
from mesh_core.crossing import bandwidth
from mesh_core.crossing.bandwidth import Link
from mesh_core.errors import PeerLost, TransportTimeout
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Settings
from mesh_core.transport.base import Address, Channel, Transport
from mesh_core.wire.failure import rebuild
from mesh_core.wire.framing import Frame

T = TypeVar("T", bound=wire.Message)

_MIXED_SLICE = 0.005
"""Seconds that one transport is waited for when a session uses several."""


class Remote:
    """A worker and the session that a host has there.

    Args:
        address: where it listens, and its key.

    Attributes:
        session: its name, 16 random bytes.
        holds_session: it was opened there, so that pings ask for it.
        watch: called by every `beat`; what it raises ends the waiting.
    """

    def __init__(self, address: Address, plugins: Plugins, settings: Settings) -> None:
        self.plugins, self.settings = plugins, settings
        self.transport: Transport = plugins.transport(address.scheme)
        self.address = self.transport.resolve(address)
        self.session = secrets.token_bytes(16)
        self.holds_session = False
        self.watch: Callable[[], None] | None = None
        self._measured: tuple[Link, Link] | None = None
        self._channel: Channel | None = None
        self._pulse: Channel | None = None
        self._welcome: wire.Welcome | None = None
        self._heard = self._pinged = monotonic()

    @property
    def welcome(self) -> wire.Welcome:
        """What the worker said of itself; `connect` first."""
        if self._welcome is None:
            raise PeerLost(f"{self.name} is not connected.")
        return self._welcome

    @property
    def name(self) -> str:
        """The worker's own name and address, or the address alone before it was heard."""
        said = self._welcome.name if self._welcome is not None else ""
        return f"{said} ({self.address.text})" if said else self.address.text

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as this end knows."""
        return self._channel is not None

    @property
    def channel(self) -> Channel:
        """That messages go over; raises PeerLost without one."""
        if self._channel is None:
            raise PeerLost(f"{self.name} is not connected.")
        return self._channel

    def connect(self, timeout: float | None = None) -> None:
        """Connect and greet; replaces a connection that is there.

        Raises:
            Unreachable, NotAuthorised: see `Transport.connect`.
            WireUnsupportedVersion: the ends speak different versions.
            TransportTimeout: it accepts connections but does not answer.
        """
        self.close()
        timeout = timeout if timeout is not None else self.settings.deadlines.connect
        self._channel = self.transport.connect(self.address, timeout)
        self._heard = self._pinged = monotonic()
        hello = wire.Hello(wire.next_id(), [wire.VERSION], __version__, self.plugins.versions(), platform.node()[:200])
        try:
            self._pulse = self.transport.connect(self.address, timeout)
            welcome = self.ask(hello, wire.Welcome, timeout=timeout)
            wire.check_versions([welcome.wire])
            self._welcome = welcome
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Drop the connection; may be called twice."""
        for channel in (self._channel, self._pulse):
            if channel is not None:
                channel.close()
        self._channel = self._pulse = None
        self.holds_session, self._measured = False, None

    def measured(self) -> tuple[Link, Link]:
        """The ways there and back, measured once per connection. Raises as `ask` does."""
        if self._measured is None:
            self._measured = measure(self)
        return self._measured

    def forget_measured(self) -> None:
        """Have `measured` measure again."""
        self._measured = None

    def tell(self, message: wire.Message, buffers: Sequence[Frame] = ()) -> None:
        """Send without waiting for an answer."""
        self.channel.send(wire.pack(message, buffers))

    def ask(
        self,
        message: wire.Message,
        reply: type[T],
        *,
        timeout: float,
        buffers: Sequence[Frame] = (),
        on_progress: Callable[[wire.Progress], None] | None = None,
    ) -> T:
        """Send, and wait for the answer with the same id.

        Raises:
            PeerLost: it fell silent.
            TransportTimeout: it is alive but did not answer within ``timeout`` seconds.
            MeshError: what the worker says went wrong.
        """
        self.tell(message, buffers)

        def wanted(_: Remote, answer: wire.Message, __: list[memoryview]) -> T | None:
            if isinstance(answer, wire.Progress) and answer.id == message.id and on_progress is not None:
                on_progress(answer)
            return answer if isinstance(answer, reply) and answer.id == message.id else None

        return await_answer([self], message.id, wanted, timeout, f"{wire.type_name(type(message))} request")

    def receive(self) -> tuple[wire.Message, list[memoryview]] | None:
        """The next message if there is one."""
        frames = self.channel.receive(0)
        if frames is None:
            return None
        self._heard = monotonic()
        return wire.unpack(frames)

    def beat(self) -> None:
        """Ping when it is time to, and take the answers.

        Raises:
            PeerLost: the worker has been silent for too long.
            SessionUnknown: it was restarted, or forgot the session.
        """
        if self.watch is not None:
            self.watch()
        if self._pulse is None:
            raise PeerLost(f"{self.name} is not connected.")
        while (frames := self._pulse.receive(0)) is not None:
            self._heard = monotonic()
            answer, _ = wire.unpack(frames)
            if isinstance(answer, wire.Failed):
                raise rebuild(answer)
        now, heartbeat = monotonic(), self.settings.heartbeat
        if now - self._heard > heartbeat.lost_after:
            raise PeerLost(f"{self.name} has not answered for {now - self._heard:.1f} s.")
        if now - self._pinged > heartbeat.interval:
            self._pinged = now
            self._pulse.send(wire.pack(wire.Ping(wire.next_id(), self.session if self.holds_session else b"")))

    def start_waiting(self) -> None:
        """Silence counts from now: a worker need not talk while nobody asks it anything."""
        self._heard = self._pinged = monotonic()


R = TypeVar("R")


def await_answer(
    remotes: Sequence[Remote],
    id_: int,
    wanted: Callable[[Remote, wire.Message, list[memoryview]], R | None],
    timeout: float,
    what: str,
) -> R:
    """Wait until ``wanted`` accepts a message of one of ``remotes``.

    A ``failed`` message for request ``id_`` or for one that was unreadable, or one that says the session is gone,
    raises what it stands for.
    """
    end = monotonic() + timeout
    for remote in remotes:
        remote.start_waiting()
    while True:
        for remote in _wait(remotes, min(end - monotonic(), _slice(remotes))):
            while (got := remote.receive()) is not None:
                message, buffers = got
                if isinstance(message, wire.Failed) and _concerns(message, remote, id_):
                    raise rebuild(message)
                result = wanted(remote, message, buffers)
                if result is not None:
                    return result
        for remote in remotes:
            remote.beat()
        if monotonic() > end:
            names = ", ".join(r.name for r in remotes)
            raise TransportTimeout(
                f"No answer to the {what} from {names} within {timeout:.0f} s, though the connection is alive.",
                hint="mesh doctor, or a longer deadline in config.toml",
            )


def _concerns(failed: wire.Failed, remote: Remote, id_: int) -> bool:
    # The worker could not read which request it refuses when the id is 0.
    return failed.id in (id_, 0) or (failed.session == remote.session and failed.error == "SessionUnknown")


def _slice(remotes: Sequence[Remote]) -> float:
    return min(r.settings.heartbeat.interval for r in remotes) / 2


def _wait(remotes: Sequence[Remote], timeout: float) -> list[Remote]:
    groups: dict[Transport, list[Remote]] = {}
    for remote in remotes:
        groups.setdefault(remote.transport, []).append(remote)
    ready: list[Remote] = []
    for transport, members in groups.items():
        limit = max(timeout, 0.0) if len(groups) == 1 else min(max(timeout, 0.0), _MIXED_SLICE)
        channels = transport.wait([m.channel for m in members], limit)
        ready += [m for m in members if m.channel in channels]
    return ready


def measure(remote: Remote) -> tuple[Link, Link]:
    """The ways to the worker and back, measured now."""

    def exchange(there: int, back: int) -> None:
        buffers = [bytes(there)] if there else []
        remote.ask(
            wire.Probe(wire.next_id(), back), wire.Probed, timeout=remote.settings.deadlines.step, buffers=buffers
        )

    there, back = bandwidth.measure(exchange)
    way = remote.channel.way
    return replace(there, way=way), replace(back, way=way)
