"""How many files and connections this process may have open, and what to tell when there are no more."""

from __future__ import annotations

import errno

try:
    import resource
except ImportError:  # Windows, where there is no such limit.
    resource = None  # type: ignore[assignment]

from mesh_core.system.logs import logger

log = logger(__name__)

_WANTED = 1 << 16
_WITHOUT_LIMIT = 1 << 13
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, getattr(errno, "WSAEMFILE", errno.EMFILE)})
"""Numbers of the errors of a process, or a machine, that has too many open."""

EXHAUSTED_HINT = "try again in some seconds; if it stays so, start it with more files allowed: ulimit -n 65536"


def raised_limit() -> int:
    """How many there may be, after asking the system for as many as it gives without being asked by its owner."""
    if resource is None:
        return _WITHOUT_LIMIT
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _WANTED if hard == resource.RLIM_INFINITY else min(hard, _WANTED)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return _WANTED if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError) as error:  # macOS has another limit that is not told.
        log.info("at most %d files and connections: %s", soft, error)
        return soft
    return most
