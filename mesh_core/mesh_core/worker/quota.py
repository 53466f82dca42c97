"""What one host may take of a worker."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quota:
    """The share of one host, so that the others get theirs.

    Attributes:
        sessions: open at once; of more, the one that was silent for longest is forgotten.
        messages: that wait to be read.
        message_bytes: of these together, but for a single one.
        steps: that wait, of one session.
        requests: to load or list checkpoints, that wait.
        neighbours: that were admitted for one session.
        probes: whose answers wait to be sent.
        probe_bytes: of these answers together.
    """

    sessions: int = 32
    messages: int = 1024
    message_bytes: int = 1 << 30
    steps: int = 8
    requests: int = 16
    neighbours: int = 8
    probes: int = 64
    probe_bytes: int = 256 << 20


QUOTA = Quota()
