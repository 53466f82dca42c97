"""What one host may take of a worker."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quota:
    """The share of one host, so that the others get theirs.

    Attributes:
        sessions: open at once; of more, the one that was silent for longest is forgotten.
        steps: that wait, of one session.
        requests: to load or list checkpoints, that wait.
        neighbours: that were admitted for one session.
        loras: that a session has, or that one message asks for.
    """

    sessions: int = 32
    steps: int = 8
    requests: int = 16
    neighbours: int = 8
    loras: int = 128


QUOTA = Quota()
