"""One thread that computes for many sessions, each in turn, and can be told to stop the current job."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from mesh_core.errors import Cancelled, WireTooLarge
from mesh_core.system.logs import logger

log = logger(__name__)


@dataclass
class Job:
    """Work of one session. ``fail`` is called in the computing thread with whatever ``run`` raises."""

    session: bytes
    step: int
    run: Callable[[], None]
    fail: Callable[[BaseException], None]
    cancelled: bool = False


class Executor:
    """Runs jobs in one thread: first in, first out within a session, and round robin over sessions.

    Args:
        waiting: jobs of one session that may wait.
    """

    def __init__(self, waiting: int, name: str = "compute") -> None:
        self._waiting = waiting
        self._queues: dict[bytes, deque[Job]] = {}
        self._ready = threading.Condition()
        self._current: Job | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue ``job``.

        Raises:
            WireTooLarge: too many of its session wait already.
        """
        with self._ready:
            queue = self._queues.setdefault(job.session, deque())
            if len(queue) >= self._waiting:
                raise WireTooLarge(f"{len(queue)} steps of one session wait already.", hint="wait for their results")
            queue.append(job)
            self._ready.notify()

    def cancel(self, session: bytes, step: int | None = None) -> None:
        """Drop the session's waiting jobs and stop its running one (all steps, or one)."""

        def concerned(job: Job) -> bool:
            return job.session == session and step in (None, job.step)

        with self._ready:
            for job in self._queues.get(session, ()):
                job.cancelled = job.cancelled or concerned(job)
            if self._current is not None and concerned(self._current):
                self._current.cancelled = True

    def busy(self) -> set[bytes]:
        """Sessions with a job that waits or runs."""
        with self._ready:
            waiting = {session for session, queue in self._queues.items() if queue}
            return waiting | ({self._current.session} if self._current else set())

    def check(self) -> None:
        """Called between blocks.

        Raises:
            Cancelled: the running job is no longer wanted.
        """
        job = self._current
        if job is not None and (job.cancelled or self._stopping):
            raise Cancelled("The step was cancelled.")

    def stop(self) -> None:
        """Stop after the running block; waiting jobs are dropped."""
        with self._ready:
            self._stopping = True
            self._queues.clear()
            self._ready.notify()
        self._thread.join(timeout=10)

    def _next(self) -> Job | None:
        with self._ready:
            while not self._queues and not self._stopping:
                self._ready.wait()
            if self._stopping:
                return None
            session, queue = next(iter(self._queues.items()))
            del self._queues[session]
            job = queue.popleft()
            if queue:
                self._queues[session] = queue
            self._current = job
            return job

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                self.check()
                job.run()
            except BaseException as error:
                self._tell(job, error)
            finally:
                with self._ready:
                    self._current = None
                # Frees the step's buffers and its session's weights now, not when the next step comes.
                del job

    @staticmethod
    def _tell(job: Job, error: BaseException) -> None:
        try:
            job.fail(error)
        except Exception:
            # The one thread that computes must outlive a failure that cannot be told.
            log.exception("a failed step could not be reported: %s", error)
