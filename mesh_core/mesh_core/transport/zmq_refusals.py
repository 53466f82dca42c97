"""Why no connection to a worker came to be: what the other end has shown, and what a connection that broke leaves open.

With CURVE, a worker that is asked for a key that it does not have only breaks off, as a bad link does. So neither is
concluded from the other: a key is another one only where the other end has proven one.
"""

from __future__ import annotations

from typing import Literal

from mesh_core.errors import NotAuthorised, Unreachable
from mesh_core.transport.address import Place
from mesh_core.transport.keys import KnownWorker
from mesh_core.transport.reach import mechanism

KeySource = Literal["joined", "given", "guessed"]
"""Why a key is expected of a worker: this user joined it; an invite or a host says so; or nobody said which, and this
user's own workers have it."""

JOIN = "mesh join INVITE, with the invite that mesh serve or mesh keys invite prints there"


class HandshakeBroken(Exception):
    """The connection ended before both ends had proven their keys, and nobody said why."""


def not_accepted(place: Place) -> NotAuthorised:
    """The worker has proven its key, and said that it does not accept ours."""
    return NotAuthorised(
        f"The worker at {place} does not accept this key.",
        hint="mesh keys invite on the worker's machine, then mesh join INVITE here",
    )


def check_mechanism(place: Place, timeout: float) -> None:
    """Ask the other end what it speaks; returns where that is what ``place`` says, or where no answer comes.

    Raises:
        Unreachable: it is no worker.
        NotAuthorised: a worker with encryption where none is expected, or the other way round.
    """
    found, wanted = mechanism(place, timeout), "NULL" if place.insecure else "CURVE"
    if found == "":
        raise Unreachable(
            f"{place} takes connections, but what answers is no worker of the mesh.",
            hint="check the port; a proxy or another program listens there",
        )
    if found is not None and found != wanted:
        runs = "without encryption" if found == "NULL" else "with encryption"
        what = f"mesh://{place.netloc}{'?insecure=yes' if found == 'NULL' else ''}"
        raise NotAuthorised(f"The worker at {place} runs {runs}.", hint=f"{what}, if that is what you want")


def another_worker(place: Place, proven: KnownWorker | None, source: KeySource) -> NotAuthorised:
    """It has proven the key of ``proven``; None: that of this user's own workers."""
    whose = f"that of {proven.name} (mesh://{proven.address})" if proven else "that of this user's own workers"
    forget = f"mesh keys forget {place.netloc}, then " if source == "joined" else ""
    return NotAuthorised(
        f"The worker at {place} has another key than the one that is expected there: {whose}.",
        hint=f"check the address; if it is the right one: {forget}mesh join with a new invite",
    )


def broken_off(place: Place, times: int, source: KeySource) -> Unreachable:
    """No handshake was finished, and it is not known why."""
    broke = f"broke {times} {'connection' if place.insecure else 'handshake'}{'s' if times > 1 else ''} off"
    if source == "guessed":
        return Unreachable(
            f"No worker at {place} was ever joined. What listens there {broke}: it does not seem to be one of this "
            "user's own.",
            hint=JOIN,
        )
    if place.insecure:
        return Unreachable(f"The worker at {place} {broke}.", hint="mesh doctor on its machine")
    compare = f"compare the 'own server key' there with that of {place.netloc} here: mesh keys list on both machines"
    return Unreachable(
        f"The worker at {place} {broke}. Either the link loses connections, or it has not the key that is expected.",
        hint=f"try again; if it stays so, {compare if source == 'joined' else 'mesh join with a new invite'}",
    )
