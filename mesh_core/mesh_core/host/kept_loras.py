"""The LoRAs that a worker keeps, outside of any session: listed, and taken away again."""

from __future__ import annotations

from typing import Any

from mesh_core import wire
from mesh_core.errors import LoraMissing
from mesh_core.host.remote import Remote

_TIMEOUT = 60
"""Seconds; a worker with many files may have to read all their headers."""

_LEAST_OF_A_HASH = 6
"""Characters from which the start of a hash names a LoRA."""


def listed(remote: Remote, timeout: float = _TIMEOUT) -> list[dict[str, Any]]:
    """What the worker has: of its folders, and received from hosts. ``timeout`` in seconds."""
    return list(remote.ask(wire.ListLoras(wire.next_id()), wire.LorasListed, timeout=timeout).loras)


def discard(remote: Remote, which: str) -> dict[str, Any]:
    """Remove the one that the worker received and that has the name ``which`` or a hash that starts so; returns it as
    it was listed.

    Raises:
        LoraMissing: none is called that, or several are.
    """
    received = [x for x in listed(remote) if x.get("received")]
    by_hash = len(which) >= _LEAST_OF_A_HASH
    found = [x for x in received if which == x["name"] or (by_hash and x["id"].startswith(which))]
    if len(found) != 1:
        names = ", ".join(f"{x['name']} ({x['id'][:12]})" for x in found or received) or "none"
        what = "several" if found else "no"
        raise LoraMissing(f"{remote.name} received {what} LoRAs {which!r}: {names}.", hint="one of these hashes")
    remote.ask(wire.Discard(wire.next_id(), found[0]["id"]), wire.Ok, timeout=_TIMEOUT)
    return found[0]
