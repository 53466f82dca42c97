"""Invites: the one line that a host pastes to become a member of a worker.

``mesh://HOST:PORT?key=...&token=...&until=...&name=...``: where the worker is, the key that it will prove, the secret
key that lets the holder in once, until when (seconds since 1970, by the worker's clock), and the worker's name.
Whoever sees an unused invite can use it; afterwards it opens nothing.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field, replace
from datetime import datetime
from time import monotonic, time
from typing import TYPE_CHECKING
from urllib.parse import quote

from mesh_core import wire
from mesh_core.errors import ConfigError, NotAuthorised, TransportTimeout, WireMalformed
from mesh_core.transport.address import (
    SCHEME,
    Place,
    is_wildcard,
    parse_netloc,
    parse_options,
    parse_place,
    with_scheme,
)
from mesh_core.transport.base import Address, Channel
from mesh_core.transport.keys import KeyPair, KeyStore, KnownWorker

if TYPE_CHECKING:
    from mesh_core.transport.zeromq import ZeroMqTransport

LIFETIME = 3600.0
"""Seconds for which an invite is good unless it is said otherwise."""

_LONGEST = 366 * 86400.0
_LONGEST_NAME = 100
_HINT = "paste the whole line that mesh serve or mesh keys invite printed, in quotes"


@dataclass(frozen=True)
class Invite:
    """What an invite says; ``str()`` is the text to paste. ``token`` is a secret key (Z85)."""

    place: Place
    server_key: str
    token: str = field(repr=False)
    until: int
    name: str

    def __str__(self) -> str:
        from mesh_core.transport.curve import url_text

        keys = f"key={url_text(self.server_key)}&token={url_text(self.token)}"
        return f"{SCHEME}://{self.place.netloc}?{keys}&until={self.until}&name={quote(self.name, safe='')}"


def create_invite(address: str, *, name: str = "", lifetime: float = LIFETIME, keys: KeyStore | None = None) -> Invite:
    """A new invite to this user's workers, good for one host; a worker that is already running accepts it too.

    Args:
        address: where hosts reach the worker; of a wildcard such as 0.0.0.0, `advertised` makes an address.
        name: what hosts will call the worker; this machine's name by default.
        lifetime: in seconds.

    Raises:
        ConfigError: the address cannot be read, is of a worker without encryption, or the lifetime is not positive.
    """
    from mesh_core.transport.curve import new_key_pair

    place = parse_place(advertised(address))
    if place.insecure:
        raise ConfigError(
            "A worker without encryption needs no invites: whoever reaches it is a member.", hint="its address alone"
        )
    if not 0 < lifetime <= _LONGEST:
        raise ConfigError("An invite is good for some time, a year at most.", hint="--minutes 60")
    store = keys if keys is not None else KeyStore()
    public, secret = new_key_pair()
    until = int(time() + max(1.0, lifetime))
    name = _named(name)
    store.invite(public, name, until)
    return Invite(place, store.identity().server.public, secret, until, name)


def parse_invite(text: str) -> Invite:
    """Read an invite's text.

    Raises:
        ConfigError: it is no invite, or not a whole one.
    """
    from mesh_core.transport.curve import from_url_text, public_of

    text = text.strip()
    shown = text[:40] + ("..." if len(text) > 40 else "")
    head, _, query = text.partition("?")
    scheme, _, netloc = with_scheme(head).partition("://")
    if scheme != SCHEME or not query:
        raise ConfigError(f"{shown!r} is not an invite.", hint=_HINT)
    options = parse_options(query, {"key", "token", "until", "name"}, shown)
    missing = sorted({"key", "token", "until", "name"} - options.keys())
    if missing:
        raise ConfigError(f"The invite lacks {missing[0]!r}; was it cut off?", hint=_HINT)
    place = parse_netloc(netloc, shown)
    try:
        server_key, token = from_url_text(options["key"]), from_url_text(options["token"])
        public_of(token)
        until = int(options["until"])
    except ValueError as error:
        raise ConfigError(f"The invite is damaged: {error}.", hint=_HINT) from error
    if len(options["name"]) > _LONGEST_NAME or not options["name"].isprintable() or not 0 < until < 1 << 40:
        raise ConfigError("The invite is damaged: its name or its time is not acceptable.", hint=_HINT)
    return Invite(place, server_key, token, until, options["name"])


def accept_invite(
    text: str,
    *,
    keys: KeyStore | None = None,
    transport: ZeroMqTransport | None = None,
    name: str = "",
    timeout: float = 10.0,
) -> KnownWorker:
    """Use an invite: this user becomes a member of the worker, which is known here from then on.

    Args:
        name: under which the worker lists us; this machine's name by default.

    Raises:
        ConfigError: the text is no invite.
        NotAuthorised: it was used, has expired, or the worker is not the one that made it.
        Unreachable, TransportTimeout: the worker does not answer.
    """
    from mesh_core.transport.curve import public_of
    from mesh_core.transport.zeromq import ZeroMqTransport

    invite = parse_invite(text)
    store = keys if keys is not None else KeyStore()
    own = transport if transport is not None else ZeroMqTransport(store)
    try:
        channel = own.connect(
            Address(str(invite.place), invite.server_key),
            timeout,
            client=KeyPair(public_of(invite.token), invite.token),
        )
        try:
            _enrol(channel, store.identity().client.public, _named(name), timeout)
        finally:
            channel.close()
    except NotAuthorised as error:
        good = datetime.fromtimestamp(invite.until).strftime("%Y-%m-%d %H:%M:%S")
        raise NotAuthorised(
            f"{error.message} An invite works once, and this one until {good}.",
            hint="ask for a new one: mesh keys invite on the worker's machine",
        ) from error
    finally:
        if transport is None:
            own.close()
    worker = KnownWorker(invite.place.netloc, invite.server_key, invite.name)
    store.remember(worker)
    return worker


def _named(name: str) -> str:
    """What can be printed of ``name``, as both ends keep it; this machine's name if that is nothing."""
    return "".join(letter for letter in name if letter.isprintable())[:_LONGEST_NAME] or socket.gethostname()


def _enrol(channel: Channel, key: str, name: str, timeout: float) -> None:
    channel.send(wire.pack(wire.Enrol(1, key, name)))
    deadline = monotonic() + timeout
    frames = channel.receive(max(0.0, deadline - monotonic()))
    if frames is None:
        raise TransportTimeout(f"The worker did not answer the invite within {timeout:g} s.", hint="try again")
    answer, _ = wire.unpack(frames)
    if isinstance(answer, wire.Failed):
        from mesh_core.wire.failure import rebuild

        raise rebuild(answer)
    if not isinstance(answer, wire.Enrolled):
        raise WireMalformed(f"The worker answered an invite with {type(answer).__name__}.")


def advertised(address: str) -> str:
    """``address`` as other machines can use it: for a wildcard, this machine's address on its default network."""
    place = parse_place(address)
    if not is_wildcard(place.host):
        return address
    family = socket.AF_INET6 if place.host == "::" else socket.AF_INET
    documentation = "2001:db8::1" if family == socket.AF_INET6 else "192.0.2.1"
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            # Connecting a datagram socket sends nothing; it only picks the address that would be sent from.
            probe.connect((documentation, 9))
            return str(replace(place, host=probe.getsockname()[0]))
        except OSError:
            return str(replace(place, host=socket.gethostname()))
