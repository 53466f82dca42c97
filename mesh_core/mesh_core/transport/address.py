"""Addresses of workers as people write them, those of the ``mesh`` scheme above all: ``mesh://HOST:PORT``, with
``?insecure=yes`` for a worker without encryption.

Knows how they are written and which are of this machine alone; opens no connection.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from urllib.parse import parse_qs

from mesh_core.errors import ConfigError

SCHEME = "mesh"
DEFAULT_PORT = 7777
_PLACE = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.%\w-]+)\]|(?P<name>[A-Za-z0-9_.-]+))(?::(?P<port>\d{1,5}))?")
_WRITTEN = "mesh://HOST or mesh://HOST:PORT, with brackets around IPv6: mesh://[::1]:7777"


@dataclass(frozen=True)
class Place:
    """Where a worker listens.

    Attributes:
        host: name or address, IPv6 without brackets.
        port: TCP port.
        insecure: without encryption and keys.
    """

    host: str
    port: int = DEFAULT_PORT
    insecure: bool = False

    def __str__(self) -> str:
        return f"{SCHEME}://{self.netloc}{'?insecure=yes' if self.insecure else ''}"

    @property
    def netloc(self) -> str:
        """``host:port``, as in a URL; the name under which known workers are kept."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def with_scheme(text: str) -> str:
    """``text`` as an address in full: no blanks around it, its scheme in small letters, ``mesh`` where it has none."""
    head, found, rest = text.strip().partition("://")
    return f"{head.lower()}://{rest}" if found else f"{SCHEME}://{head}"


def parse_place(text: str) -> Place:
    """The place that ``mesh://HOST:PORT`` names, or ``HOST:PORT`` alone.

    Raises:
        ConfigError: the text is no such address.
    """
    scheme, _, rest = with_scheme(text).partition("://")
    place, _, query = rest.partition("?")
    if scheme != SCHEME:
        raise ConfigError(f"{text[:200]!r} is not an address of a worker.", hint=_WRITTEN)
    if "token=" in query:
        raise ConfigError(f"{place[:200]!r} with a token is an invite, no address.", hint='mesh join "INVITE" first')
    options = parse_options(query, {"insecure"}, text)
    if options.get("insecure", "yes") != "yes":
        raise ConfigError(f"{text[:200]!r}: insecure is 'yes' or not there at all.", hint=_WRITTEN)
    return parse_netloc(place, text, insecure="insecure" in options)


def parse_netloc(place: str, text: str, *, insecure: bool = False) -> Place:
    """``HOST:PORT`` as a part of ``text``, which an error names."""
    match = _PLACE.fullmatch(place.removesuffix("/"))
    port = int(match["port"] or DEFAULT_PORT) if match else -1
    if match is None or not 0 <= port <= 65535:
        raise ConfigError(f"{text[:200]!r} does not name a host and a port.", hint=_WRITTEN)
    host, zone, interface = (match["six"] or match["name"]).partition("%")
    return Place(f"{host.lower()}{zone}{interface}", port, insecure)


def parse_options(query: str, known: set[str], text: str) -> dict[str, str]:
    """``name=value&...``, each at most once, and only known names.

    Raises:
        ConfigError: anything else; names it.
    """
    try:
        parsed = parse_qs(query, keep_blank_values=True, strict_parsing=bool(query), max_num_fields=16)
    except ValueError as error:
        raise ConfigError(f"{text[:200]!r}: {query[:100]!r} cannot be read: {error}.", hint=_WRITTEN) from error
    for name, values in parsed.items():
        if name not in known:
            raise ConfigError(f"{text[:200]!r}: there is no option {name[:40]!r}.", hint=f"one of {sorted(known)}")
        if len(values) > 1:
            raise ConfigError(f"{text[:200]!r}: {name} occurs {len(values)} times.", hint="it once")
    return {name: values[0] for name, values in parsed.items()}


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine seen from itself. Only ``localhost`` among names."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def is_wildcard(host: str) -> bool:
    """Whether ``host`` means all addresses of a machine."""
    return host in ("0.0.0.0", "::", "*")


def numeric(host: str) -> str:
    """A numeric address for ``host``, to listen at.

    Raises:
        ConfigError: the name does not resolve.
    """
    if host == "*":
        return "0.0.0.0"
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"Cannot listen at {host!r}: the name does not resolve ({error}).", hint="an address of this machine"
        ) from error
    return str(found[0][4][0])
