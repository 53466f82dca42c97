"""What one host may take of a worker."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quota:
    """The share of one host, so that the others get theirs.

    Attributes:
        sessions: open at once; of more, the one that was silent for longest is forgotten.
        steps: that wait, of one session.
        requests: of one kind (to load or list, LoRAs that arrive, constants), that wait.
        request_bytes: that come with them, unless it is one request alone.
        neighbours: that were admitted for one session.
        probes: whose answers wait to be sent.
        probe_bytes: of these answers together.
        loras: that a session has, or that one message asks for.
    """

    sessions: int = 32
    steps: int = 8
    requests: int = 16
    request_bytes: int = 1 << 30
    neighbours: int = 8
    probes: int = 64
    probe_bytes: int = 256 << 20
    loras: int = 128


QUOTA = Quota()
