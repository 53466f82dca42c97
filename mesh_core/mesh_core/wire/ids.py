"""Numbers for requests, new in this process each."""

from __future__ import annotations

import itertools

_IDS = itertools.count(1)


def next_id() -> int:
    """A request id that is new in this process."""
    return next(_IDS)
