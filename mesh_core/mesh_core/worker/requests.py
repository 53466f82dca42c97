"""Requests that take long: served in threads of their own, a limited number of each host."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from mesh_core import wire
from mesh_core.errors import WireTooLarge
from mesh_core.system.logs import logger
from mesh_core.transport.base import Peer
from mesh_core.worker.quota import QUOTA
from mesh_core.worker.replies import Replies

log = logger(__name__)


class RequestThreads:
    """Two kinds of thread, so that what arrives over a slow link and what loads do not wait for each other.

    Attributes:
        loading: two threads, for what reads files.
        receiving: one thread, for LoRAs that hosts send.
    """

    def __init__(self, replies: Replies) -> None:
        self._replies = replies
        self.loading = ThreadPoolExecutor(max_workers=2, thread_name_prefix="load")
        self.receiving = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lora")
        self._waiting: Counter[str] = Counter()
        self._lock = threading.Lock()

    def submit(self, threads: ThreadPoolExecutor, peer: Peer, message: wire.Message, work: Callable[[], None]) -> None:
        """Have ``work``, which answers ``message``, done in ``threads``; what it raises is the answer.

        Raises:
            WireTooLarge: too many requests of this host wait already.
        """

        def run() -> None:
            try:
                work()
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
        threads.submit(run)

    def stop(self) -> None:
        """Drop what waits and return when what runs has ended."""
        for threads in (self.loading, self.receiving):
            threads.shutdown(wait=True, cancel_futures=True)
