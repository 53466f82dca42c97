"""What a process that was forked must do without: threads of native libraries, which it has not and would wait for."""

from __future__ import annotations

import os

from blake3 import blake3

_PROCESS = os.getpid()
"""That read this file; a fork of it has another number."""


def hash_threads() -> int:
    """How many threads a large BLAKE3 hash may take: all, or in a fork of this process one."""
    return int(blake3.AUTO) if os.getpid() == _PROCESS else 1
