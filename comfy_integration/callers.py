"""Who may use the pack's routes: the page of this ComfyUI, and no other page that the same browser has open.

A page of another site names itself in Origin. A site can also point its own name at this machine; its page then is of
the same origin, but Host is its name. So Host must be an address, a name that no public server can have, or one that
the user named.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping
from ipaddress import ip_address
from urllib.parse import urlsplit

from mesh_core.errors import NotAuthorised

_PRIVATE = (".localhost", ".local", ".lan", ".internal", ".home.arpa")
"""Endings that are not in the public DNS."""

HostPort = tuple[str, int | None]


def check_caller(headers: Mapping[str, str], named: Collection[str]) -> None:
    """Look at the headers of a request.

    Args:
        named: names that the user accepts; one that starts with a dot stands for all names that end so.

    Raises:
        NotAuthorised: another site's page, or a name that may be another site's.
    """
    host = _place(headers.get("Host", ""))
    if host is None or not (_safe(host[0]) or _listed(host[0], named)):
        raise _refused("This ComfyUI was reached as", headers.get("Host", ""), host)
    origin = headers.get("Origin")
    if origin is not None:
        place = _place(origin.partition("://")[2])
        if place is None or not (_same(host, place) or _listed(place[0], named)):
            raise _refused("The request is of a page of", origin, place)
    elif headers.get("Sec-Fetch-Site") == "cross-site":
        raise _refused("The request is of a page of", "another site", None)


def _place(text: str) -> HostPort | None:
    """Host name and port, if it has one; None for what is neither."""
    try:
        parts = urlsplit(f"//{text}")
        name, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        return None
    return (name, port) if name else None


def _safe(name: str) -> bool:
    try:
        ip_address(name.partition("%")[0])
    except ValueError:
        return "." not in name or name.endswith(_PRIVATE) or name == socket.gethostname().lower().rstrip(".")
    return True


def _listed(name: str, named: Collection[str]) -> bool:
    return any(name == n or (n.startswith(".") and name.endswith(n)) for n in (n.lower().rstrip(".") for n in named))


def _same(host: HostPort, origin: HostPort) -> bool:
    # Some browsers leave the port out, and so do proxies.
    return host[0] == origin[0] and (None in (host[1], origin[1]) or host[1] == origin[1])


def _refused(what: str, text: str, place: HostPort | None) -> NotAuthorised:
    shown = "".join(letter for letter in text[:100] if letter.isprintable()) or "nothing"
    name = place[0] if place is not None and place[0].isprintable() and len(place[0]) <= 100 else "NAME"
    return NotAuthorised(
        f"{what} {shown}, which may be a site that means harm.",
        hint=f'if you know it: hosts = ["{name}"] under [comfy] in config.toml (mesh doctor says where), or the page '
        "by the address of this machine",
    )
