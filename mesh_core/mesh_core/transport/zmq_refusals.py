"""Why a worker took a connection and then broke it off: what libzmq knows of it, and what the other end speaks."""

from __future__ import annotations

import zmq

from mesh_core.errors import NotAuthorised, TransportError, Unreachable
from mesh_core.transport.address import Place
from mesh_core.transport.reach import mechanism


class WorkerEnded(Exception):
    """The worker took a connection and is gone; it may be starting anew."""


def why_refused(place: Place, event: int) -> TransportError:
    """The error for a handshake with the worker at ``place`` that ended with libzmq's ``event``.

    Raises:
        WorkerEnded: it is gone, which says nothing of why.
    """
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return NotAuthorised(
            f"The worker at {place} does not accept this key.",
            hint="mesh keys invite on the worker's machine, then mesh join INVITE here",
        )
    # Whatever else went wrong, libzmq only knows that it did: ask the other end what it speaks.
    found, wanted = mechanism(place), "NULL" if place.insecure else "CURVE"
    if found is None:
        raise WorkerEnded
    if not found:
        return Unreachable(
            f"{place} takes connections, but what answers is no worker of the mesh.",
            hint="check the port; a proxy or another program listens there",
        )
    if found == wanted == "CURVE":
        return NotAuthorised(
            f"The worker at {place} has another key than the one that is known for it.",
            hint=f"if it was set up anew: mesh keys forget {place.netloc}, then mesh join with a new invite",
        )
    if found != wanted:
        runs = "without encryption" if found == "NULL" else "with encryption"
        what = f"mesh://{place.netloc}{'?insecure=yes' if found == 'NULL' else ''}"
        return NotAuthorised(f"The worker at {place} runs {runs}.", hint=f"{what}, if that is what you want")
    return Unreachable(f"The worker at {place} broke the connection off.", hint="try again")
