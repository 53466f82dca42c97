"""One thread that computes for many sessions, each in turn, and can be told to stop the current job."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from time import monotonic

from mesh_core.errors import Cancelled, TransportTimeout, WireTooLarge
from mesh_core.system.logs import logger
from mesh_core.worker.turns import Turns

log = logger(__name__)


@dataclass
class Job:
    """Work of one session.

    Attributes:
        fail: called in the computing thread with whatever ``run`` raises.
        owner: the member whose session it is.
        until: time (monotonic) after which nobody wants the result.
    """

    session: bytes
    step: int
    run: Callable[[], None]
    fail: Callable[[BaseException], None]
    owner: str = ""
    until: float = inf
    cancelled: bool = False


class Executor:
    """Runs jobs in one thread: first in, first out within a session, and round robin over members and their sessions.

    Args:
        waiting: jobs of one session that may wait.
    """

    def __init__(self, waiting: int, name: str = "compute") -> None:
        self._waiting = waiting
        self._turns: Turns[Job] = Turns()
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
            waiting = self._turns.waiting(job.owner, job.session)
            if waiting >= self._waiting:
                raise WireTooLarge(f"{waiting} steps of one session wait already.", hint="wait for their results")
            self._turns.put(job.owner, job.session, job)
            self._ready.notify()

    def cancel(self, session: bytes, step: int | None = None) -> None:
        """Drop the session's waiting jobs and stop its running one (all steps, or one)."""

        def concerned(job: Job) -> bool:
            return job.session == session and step in (None, job.step)

        with self._ready:
            for line, jobs in self._turns.lines():
                for job in jobs if line == session else ():
                    job.cancelled = job.cancelled or concerned(job)
            if self._current is not None and concerned(self._current):
                self._current.cancelled = True

    def busy(self) -> set[bytes]:
        """Sessions with a job that waits or runs."""
        with self._ready:
            waiting = {session for session, _ in self._turns.lines()}
            return waiting | ({self._current.session} if self._current else set())

    def check(self) -> None:
        """Called by what computes, often: before every layer.

        Raises:
            Cancelled: the running job is no longer wanted.
            TransportTimeout: its time is over.
        """
        job = self._current
        if job is None:
            return
        if job.cancelled or self._stopping:
            raise Cancelled("The step was cancelled.")
        if monotonic() > job.until:
            raise TransportTimeout(
                f"Step {job.step} waited and computed longer than its deadline.",
                hint="fewer steps at once, or a longer deadlines.step in config.toml of the host and of the worker",
            )

    def stop(self, within: float = 10.0) -> bool:
        """Stop after the running layer, or wait ``within`` seconds for it; waiting jobs are dropped. Whether it has
        stopped."""
        with self._ready:
            self._stopping = True
            self._turns.clear()
            self._ready.notify()
        self._thread.join(timeout=within)
        return not self._thread.is_alive()

    def _next(self) -> Job | None:
        with self._ready:
            while not self._stopping:
                self._current = self._turns.take()
                if self._current is not None:
                    return self._current
                self._ready.wait()
            return None

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
