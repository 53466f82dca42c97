"""One computing thread for many sessions: fair, stoppable, and never ended by a job."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import pytest

from mesh_core.errors import Cancelled, TransportTimeout, WireTooLarge
from mesh_core.worker.executor import Executor, Job
from tests.support.workers import wait_until


class Log:
    """What ran and what failed, in order; jobs can be held back until `release`."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.ran: list[tuple[bytes, int]] = []
        self.failed: list[tuple[bytes, int, BaseException]] = []
        self.release = threading.Event()
        self.started = threading.Event()

    def job(self, session: bytes, step: int, run: Callable[[], None] | None = None, **more: Any) -> None:
        def work() -> None:
            if run is not None:
                run()
            self.ran.append((session, step))

        def fail(error: BaseException) -> None:
            self.failed.append((session, step, error))

        self.executor.submit(Job(session, step, work, fail, **more))

    def hold(self, session: bytes = b"first") -> None:
        """A job that runs until `release`, looking after each "block" whether it is still wanted."""

        def run() -> None:
            self.started.set()
            while not self.release.wait(0.01):
                self.executor.check()

        self.job(session, 0, run)
        assert self.started.wait(5)

    def done(self, count: int) -> None:
        wait_until(lambda: len(self.ran) + len(self.failed) >= count, what="the last job")


@pytest.fixture
def log() -> Iterator[Log]:
    executor = Executor(waiting=64)
    log = Log(executor)
    yield log
    log.release.set()
    executor.stop()


def test_eight_sessions_take_turns_however_much_each_has_queued(log: Log) -> None:
    log.hold()
    sessions = [bytes([i]) for i in range(8)]
    for i, session in enumerate(sessions):
        for step in range(20 if i == 0 else 5):
            log.job(session, step)
    log.release.set()
    log.done(1 + 20 + 7 * 5)
    assert log.ran[1:41] == [(s, step) for step in range(5) for s in sessions]
    assert log.ran[41:] == [(sessions[0], step) for step in range(5, 20)]


def test_who_asks_one_step_at_a_time_waits_for_one_step_of_each_other(log: Log) -> None:
    log.hold(b"busy")
    for step in range(30):
        log.job(b"busy", step + 1)
    log.job(b"modest", 1)
    log.release.set()
    log.done(32)
    assert log.ran.index((b"modest", 1)) == 2


def test_a_member_with_many_sessions_has_one_turn_like_the_others(log: Log) -> None:
    log.hold()
    for number in range(8):
        for step in range(3):
            log.job(bytes([number]), step, owner="greedy")
    log.job(b"modest", 1, owner="honest")
    log.job(b"modest", 2, owner="honest")
    log.release.set()
    log.done(1 + 24 + 2)
    assert log.ran.index((b"modest", 1)) <= 2 and log.ran.index((b"modest", 2)) <= 4


def test_a_job_stops_when_its_time_is_over(log: Log) -> None:
    def endless() -> None:
        while True:
            log.executor.check()

    log.job(b"a", 1, endless, until=monotonic() + 0.05)
    log.job(b"b", 1)
    log.done(2)
    assert isinstance(log.failed[0][2], TransportTimeout) and log.ran == [(b"b", 1)]


def test_a_thread_that_hangs_does_not_keep_the_executor_from_stopping() -> None:
    started, release, executor = threading.Event(), threading.Event(), Executor(waiting=1)
    executor.submit(Job(b"a", 1, lambda: (started.set(), release.wait(20))[0], lambda _: None))
    assert started.wait(10)
    assert not executor.stop(within=0.1)
    release.set()
    assert executor.stop()


def test_cancelling_stops_the_running_job_and_drops_the_waiting_ones(log: Log) -> None:
    log.hold(b"a")
    log.job(b"a", 1)
    log.job(b"b", 1)
    log.executor.cancel(b"a")
    log.done(3)
    assert [(s, n, type(e)) for s, n, e in log.failed] == [(b"a", 0, Cancelled), (b"a", 1, Cancelled)]
    assert log.ran == [(b"b", 1)]


def test_cancelling_one_step_leaves_the_others(log: Log) -> None:
    log.hold(b"a")
    for step in (1, 2, 3):
        log.job(b"a", step)
    log.executor.cancel(b"a", 2)
    log.release.set()
    log.done(4)
    assert log.ran == [(b"a", 0), (b"a", 1), (b"a", 3)]


def test_errors_reach_the_job_and_the_next_one_runs(log: Log) -> None:
    def broken() -> None:
        raise ZeroDivisionError("in the model")

    log.job(b"a", 1, broken)
    log.job(b"a", 2)
    log.done(2)
    assert isinstance(log.failed[0][2], ZeroDivisionError) and log.ran == [(b"a", 2)]


def test_a_failure_that_cannot_be_told_ends_nothing(log: Log, caplog: pytest.LogCaptureFixture) -> None:
    def raises(*_: object) -> None:
        raise OSError("the host is gone")

    log.executor.submit(Job(b"a", 1, raises, raises))
    log.job(b"a", 2)
    log.done(1)
    assert log.ran == [(b"a", 2)] and "could not be reported" in caplog.text


def test_busy_names_the_sessions_that_wait_or_run(log: Log) -> None:
    log.hold(b"a")
    log.job(b"b", 1)
    assert log.executor.busy() == {b"a", b"b"}
    log.release.set()
    wait_until(lambda: not log.executor.busy())


def test_a_session_cannot_fill_the_memory_with_waiting_jobs(log: Log) -> None:
    log.hold(b"a")
    with pytest.raises(WireTooLarge):
        for step in range(65):
            log.job(b"b", step)
    log.job(b"c", 1)


def test_stopping_ends_the_running_job_and_drops_the_rest(log: Log) -> None:
    log.hold(b"a")
    log.job(b"b", 1)
    log.executor.stop()
    assert isinstance(log.failed[0][2], Cancelled)
    assert log.ran == []
