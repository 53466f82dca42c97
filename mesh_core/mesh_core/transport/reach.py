"""Plain TCP in front of ZeroMQ, which retries in silence: is there anybody, and what do they speak?"""

from __future__ import annotations

import socket
from time import monotonic, sleep

from mesh_core.errors import TransportError, Unreachable
from mesh_core.system.handles import EXHAUSTED, EXHAUSTED_HINT
from mesh_core.transport.address import Place

WAY = "is the machine awake, on this network or VPN, and the port open in its firewall?"
"""What to look at where nothing answers."""

_RETRY = 0.05
_DIAGNOSIS = 2.0
_SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
_OPENING = _SIGNATURE + b"\x03\x00"
"""The begin of a ZMTP 3.0 greeting (RFC 23): signature and version. The other end answers it with its own greeting;
our mechanism is left out, because the other end would break off at one that it does not like."""
_GREETING_LENGTH = 64


def reach(place: Place, timeout: float) -> str:
    """The numeric address under which ``place`` accepts TCP connections; tries until ``timeout`` seconds passed.

    Raises:
        Unreachable: the name does not resolve, nobody listens, or nothing answers; says which.
        TransportError: this process has too many connections and files open.
    """
    deadline = monotonic() + timeout
    while True:
        left = max(0.01, deadline - monotonic())
        try:
            with socket.create_connection((place.host, place.port), timeout=left) as connection:
                if connection.getpeername() == connection.getsockname():
                    # The system picked the wanted port for our own end: we reached ourselves.
                    raise ConnectionRefusedError("nobody listens")
                return str(connection.getpeername()[0])
        except (socket.gaierror, UnicodeError) as error:
            raise Unreachable(
                f"The name {place.host!r} of {place} does not resolve: {error}.", hint="the worker's IP address"
            ) from error
        except TimeoutError as error:
            raise Unreachable(
                f"Nothing answers at {place} within {max(timeout, 0.1):.1f} s.",
                hint=WAY,
            ) from error
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise TransportError(f"Connecting to {place} failed: {error}.", hint=EXHAUSTED_HINT) from error
            if monotonic() + _RETRY > deadline:
                raise _nobody(place, error) from error
            sleep(_RETRY)


def _nobody(place: Place, error: OSError) -> Unreachable:
    if isinstance(error, ConnectionRefusedError):
        hint = f"mesh serve --port {place.port} on {place.host}; with --bind 0.0.0.0 for other machines to reach it"
        return Unreachable(f"Nobody listens at {place}: the connection is refused.", hint=hint)
    return Unreachable(f"{place} cannot be reached: {error.strerror or error}.", hint=WAY)


def mechanism(place: Place, timeout: float) -> str | None:
    """What the listener at ``place`` speaks: ``"CURVE"``, ``"NULL"``, "" if not ZMTP 3; None where it does not say."""
    greeting = b""
    try:
        with socket.create_connection((place.host, place.port), timeout=max(0.01, min(timeout, _DIAGNOSIS))) as end:
            end.sendall(_OPENING)
            while len(greeting) < _GREETING_LENGTH and (part := end.recv(_GREETING_LENGTH - len(greeting))):
                greeting += part
    except OSError:
        pass  # What came before it is looked at all the same.
    if greeting[:1] not in (b"", b"\xff") or greeting[9:10] not in (b"", b"\x7f"):
        return ""
    if len(greeting) < _GREETING_LENGTH:
        return None
    return greeting[12:32].rstrip(b"\0").decode("ascii", "replace")
