"""What happens after a step went wrong: which errors are mended, how often, and how a lost worker is waited for.

Knows no codecs and no legs: whoever opens sessions gives a function that opens them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic, sleep, strftime

from mesh_codec.errors import CodecStateLost
from mesh_core.crossing.stats import RunStats
from mesh_core.errors import (
    Cancelled,
    ConstantsMissing,
    MeshError,
    PeerLost,
    SessionUnknown,
    TransportTimeout,
    Unreachable,
)
from mesh_core.host.options import SessionOptions
from mesh_core.host.progress import Activity, Phase, ProgressReport
from mesh_core.host.remote import Remote

MAX_REPAIRS = 3
"""How often a step is sent again before its error is the caller's."""

GONE = (PeerLost, Unreachable, SessionUnknown)
"""Errors after which connections and sessions are opened anew before a step is sent again."""

RESENT = (Cancelled, ConstantsMissing, CodecStateLost)
"""Errors after which a step is sent again to workers that are there. Only a worker cancels: it took this host for gone
while the machine slept."""

WAITED_FOR = (*GONE, TransportTimeout)
"""What may come of an attempt to reach a lost worker, while there is time for another."""

_RETRY_PAUSE = 0.2
"""Seconds between two attempts to reach a lost worker."""

_LEAST_CONNECT = 1.0
"""Seconds that an attempt has, however little is left of the time to wait for a lost worker; the first one has as much,
and each later one twice what the one before had."""


class Recovery:
    """Waits for the lost workers of one session.

    Args:
        reopen: connects and opens everything; takes the seconds that each connection may take. Workers that kept the
            stage answer at once.
        report: told how long a worker is waited for.
    """

    def __init__(
        self, remotes: Sequence[Remote], options: SessionOptions, stats: RunStats,
        reopen: Callable[[float], None], report: ProgressReport | None,
    ) -> None:  # fmt: skip
        self._remotes, self._options, self._stats = remotes, options, stats
        self._reopen, self._report = reopen, report

    def recover(self, cause: MeshError) -> None:
        """Reconnect and reopen everything.

        Raises:
            PeerLost: a worker did not come back in time.
        """
        began, deadlines = monotonic(), self._options.settings.deadlines
        since, why = strftime("%H:%M:%S"), cause.message
        self._stats.reconnects += 1
        patience = _LEAST_CONNECT
        while True:
            if self._options.watch is not None:
                self._options.watch()
            waited = monotonic() - began
            if self._report is not None:
                self._report(Activity("", Phase.WAITING, int(waited), int(deadlines.reconnect), why))
            for remote in self._remotes:
                remote.close()
            try:
                self._reopen(min(deadlines.connect, patience, max(deadlines.reconnect - waited, _LEAST_CONNECT)))
                return
            except WAITED_FOR as error:
                waited = monotonic() - began
                if waited > deadlines.reconnect:
                    raise PeerLost(
                        f"{cause.message} It has been away since {since} ({waited:.0f} s): {error.message}",
                        hint="mesh serve on that machine again, mesh doctor to test the way there, or run without it",
                    ) from error
                why = error.message
            patience *= 2
            sleep(_RETRY_PAUSE)
