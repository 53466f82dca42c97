"""Threads for what takes long: no member holds all of them, and none keeps a worker from stopping."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from mesh_core.errors import WireTooLarge
from mesh_core.worker.quota import QUOTA
from mesh_core.worker.requests import FairThreads
from tests.support.workers import wait_until


@pytest.fixture
def threads() -> Iterator[FairThreads]:
    made = FairThreads("test", 4, each=2)
    yield made
    made.stop()


def work(done: Callable[[], object]) -> Iterator[None]:
    """In one piece."""
    done()
    yield


def test_a_member_whose_requests_hang_leaves_threads_for_others(threads: FairThreads) -> None:
    release, ran = threading.Event(), list[str]()
    for _ in range(QUOTA.requests):
        threads.submit("greedy", work(lambda: (release.wait(20), ran.append("greedy"))))
    threads.submit("honest", work(lambda: ran.append("honest")))
    wait_until(lambda: ran == ["honest"], what="the honest request")
    with pytest.raises(WireTooLarge):
        threads.submit("greedy", work(print))
    release.set()
    wait_until(lambda: len(ran) == 1 + QUOTA.requests, what="everything else")


def test_requests_that_wait_hold_few_bytes(threads: FairThreads) -> None:
    release, ran = threading.Event(), list[int]()
    for _ in range(2):
        threads.submit("key", work(lambda: release.wait(20)), QUOTA.request_bytes // 2)
    with pytest.raises(WireTooLarge):
        threads.submit("key", work(print), 1)
    threads.submit("other", work(lambda: ran.append(1)), 2 * QUOTA.request_bytes)
    release.set()
    wait_until(lambda: ran, what="one large request alone")


def test_a_request_that_hangs_does_not_keep_a_worker_from_stopping(threads: FairThreads) -> None:
    started, release = threading.Event(), threading.Event()
    threads.submit("key", work(lambda: (started.set(), release.wait(20))))
    assert started.wait(10)
    threads.stop()
    assert not threads.join(0.1)
    release.set()
    assert threads.join(10)


def test_works_of_one_line_are_done_in_the_order_in_which_they_came(threads: FairThreads) -> None:
    """A host that gave up waiting for a change of LoRAs asks again: the later request must be the one that stays."""
    done, release = list[int](), threading.Event()
    threads.submit("key", work(lambda: (release.wait(20), done.append(0))), line=b"session")
    for number in range(1, 12):
        threads.submit("key", work(lambda number=number: done.append(number)), line=b"session")
    threads.submit("key", work(lambda: done.append(-1)), line=b"another")
    wait_until(lambda: done == [-1], what="another line")
    release.set()
    wait_until(lambda: len(done) == 13, what="all of the line")
    assert done == [-1, *range(12)]
