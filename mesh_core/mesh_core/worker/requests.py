"""Requests that take long: served in threads of their own, a limited number of each host."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from mesh_core import wire
from mesh_core.errors import WireTooLarge
from mesh_core.transport.base import Peer
from mesh_core.worker.quota import QUOTA
from mesh_core.worker.replies import Replies
from mesh_core.worker.turns import Turns

log = logging.getLogger(__name__)

_ENDS_WITHIN = 10.0
"""Seconds for a piece of a LoRA at the end."""


class RequestThreads:
    """Two kinds of thread, so that what arrives over a slow link and what loads do not wait for each other.

    Attributes:
        loading: two threads, for what reads files.
        receiving: one thread, for LoRAs that hosts send, which works for each host in turn.
    """

    def __init__(self, replies: Replies) -> None:
        self._replies = replies
        self.loading = ThreadPoolExecutor(max_workers=2, thread_name_prefix="load")
        self.receiving = Turns("lora")
        self._waiting: Counter[str] = Counter()
        self._lock = threading.Lock()

    def submit(
        self,
        threads: ThreadPoolExecutor | Turns,
        peer: Peer,
        message: wire.Message,
        work: Callable[[], Iterator[None] | None],
    ) -> None:
        """Have ``work``, which answers ``message``, done in ``threads``; what it raises is the answer.

        Args:
            work: may return the pieces that it is done in.

        Raises:
            WireTooLarge: too many requests of this host wait already.
        """

        def run() -> Iterator[None]:
            try:
                pieces = work()
                if pieces is not None:
                    yield from pieces
            except GeneratorExit:
                raise
            except BaseException as error:
                log.info("%s failed: %s", type(message).__name__, error)
                self._replies.fail(peer.route, message, error)
            finally:
                with self._lock:
                    self._waiting -= Counter([peer.key])

        with self._lock:
            if self._waiting[peer.key] >= QUOTA.requests:
                raise WireTooLarge(f"{QUOTA.requests} requests of one host wait already.", hint="wait for the answers")
            self._waiting[peer.key] += 1
        if isinstance(threads, Turns):
            threads.submit(peer.key, run())
        else:
            threads.submit(list, run())

    def stop(self) -> None:
        """Drop what waits and return when what runs has ended."""
        self.loading.shutdown(wait=True, cancel_futures=True)
        self.receiving.stop(_ENDS_WITHIN)
