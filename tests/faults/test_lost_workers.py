"""Workers that die, sleep or come back: the generation ends as if nothing had been, or says what is wrong."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import monotonic

import pytest
import torch

from mesh_core.errors import PeerLost, Unreachable
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Deadlines, Settings
from tests.adapters import tiny
from tests.faults.conftest import IMPATIENT, Case
from tests.faults.processes import workers
from tests.support.splitting import split
from tests.support.workers import wait_until


class Reports:
    """What a host was told, and when."""

    def __init__(self) -> None:
        self.waiting: list[float] = []

    def __call__(self, worker: str, phase: str, done: int, total: int) -> None:
        if phase == "waiting for it to come back":
            self.waiting.append(monotonic())


def test_a_worker_killed_in_a_step_and_started_again(slow: Case, plugins: Plugins) -> None:
    with workers(slow.path.parent) as (worker,), ThreadPoolExecutor(1) as pool:
        reports = Reports()
        with split(slow.path, ":1", [worker.address], plugins, settings=IMPATIENT, report=reports) as runner:
            step = pool.submit(runner, slow.inputs)
            worker.wait_for_work()
            killed = monotonic()
            worker.kill()
            wait_until(lambda: reports.waiting, 5, "noticing the loss")
            assert reports.waiting[0] - killed < 5
            worker.begin()
            assert torch.equal(step.result(30), slow.expected)
            assert runner.stats.steps[0].resent == 1 and runner.stats.reconnects == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_of_a_chain_replaced_within_a_second(slow: Case, plugins: Plugins, victim: int) -> None:
    with workers(slow.path.parent, 2, IMPATIENT) as pair, ThreadPoolExecutor(1) as pool:
        with split(slow.path, ":1", [w.address for w in pair], plugins, settings=IMPATIENT) as runner:
            step = pool.submit(runner, slow.inputs)
            pair[victim].wait_for_work(0.05)
            began = monotonic()
            pair[victim].restart()
            assert monotonic() - began < 1
            assert torch.equal(step.result(30), slow.expected)
            assert runner.stats.steps[0].resent >= 1
            # The chain is as before: the host is not the relay of states for good.
            assert torch.equal(runner(slow.inputs), slow.expected)


def test_the_next_worker_of_a_chain_is_gone_when_the_state_is_to_be_handed_on(slow: Case, plugins: Plugins) -> None:
    with workers(slow.path.parent, 2, IMPATIENT) as pair, ThreadPoolExecutor(1) as pool:
        with split(slow.path, ":1", [w.address for w in pair], plugins, settings=IMPATIENT) as runner:
            step = pool.submit(runner, slow.inputs)
            pair[0].wait_for_work(0.05)
            pair[1].restart()
            assert torch.equal(step.result(30), slow.expected)


def test_a_silent_worker_is_noticed_within_five_seconds_and_welcome_back(slow: Case, plugins: Plugins) -> None:
    with workers(slow.path.parent) as (worker,), ThreadPoolExecutor(1) as pool:
        reports = Reports()
        with split(slow.path, ":1", [worker.address], plugins, settings=Settings(), report=reports) as runner:
            step = pool.submit(runner, slow.inputs)
            worker.wait_for_work()
            paused = monotonic()
            worker.pause()
            wait_until(lambda: reports.waiting, 8, "noticing the silence")
            assert reports.waiting[0] - paused < 5
            worker.resume()
            assert torch.equal(step.result(30), slow.expected)
            assert runner.stats.reconnects == 1


def test_a_pause_shorter_than_the_patience_costs_nothing(slow: Case, plugins: Plugins) -> None:
    with workers(slow.path.parent) as (worker,), ThreadPoolExecutor(1) as pool:
        with split(slow.path, ":1", [worker.address], plugins) as runner:
            step = pool.submit(runner, slow.inputs)
            worker.wait_for_work()
            worker.pause()
            with pytest.raises(TimeoutError):
                step.result(2)
            worker.resume()
            assert torch.equal(step.result(30), slow.expected)
            assert runner.stats.reconnects == 0 and runner.stats.steps[0].resent == 0


@pytest.mark.parametrize("way", ["kill", "pause"])
def test_a_worker_that_stays_away(slow: Case, plugins: Plugins, way: str) -> None:
    settings = replace(IMPATIENT, deadlines=Deadlines(connect=2.0, reconnect=1.0))
    with workers(slow.path.parent) as (worker,), ThreadPoolExecutor(1) as pool:
        with split(slow.path, ":1", [worker.address], plugins, settings=settings) as runner:
            step = pool.submit(runner, slow.inputs)
            worker.wait_for_work()
            getattr(worker, way)()
            with pytest.raises(PeerLost) as caught:
                step.result(10)
            assert worker.address.removeprefix("mesh://") in caught.value.message
            assert re.search(r"away since \d\d:\d\d:\d\d \(\d+ s\)", caught.value.message)
            assert "mesh serve" in caught.value.hint and "mesh doctor" in caught.value.hint


def test_a_worker_killed_while_it_loads(tmp_path: Path, plugins: Plugins) -> None:
    path = tmp_path / "models" / "klein"
    wide = {"attention_head_dim": 128, "num_attention_heads": 6, "axes_dims_rope": (32, 32, 32, 32)}
    large = tiny.transformer(guidance=False, doubles=1, singles=6, seed=3, **wide)
    large.save_pretrained(path)
    inputs = tiny.inputs(guidance=False)
    with torch.no_grad():
        expected = large(**inputs, return_dict=False)[0]
    with workers(path.parent) as (worker,):
        kills: list[float] = []
        restart: list[threading.Thread] = []

        def report(name: str, phase: str, done: int, total: int) -> None:
            if phase == "loading" and not kills:
                kills.append(done / total)
                worker.kill()
                restart.append(threading.Thread(target=worker.begin))
                restart[0].start()

        with split(path, ":1", [worker.address], plugins, settings=IMPATIENT, report=report) as runner:
            restart[0].join()
            assert kills[0] < 1 and runner.stats.reconnects == 1
            assert torch.equal(runner(inputs), expected)


def test_an_unreachable_worker_is_not_waited_for(quick: Case, plugins: Plugins) -> None:
    with workers(quick.path.parent) as (worker,):
        worker.kill()
        settings = replace(IMPATIENT, deadlines=Deadlines(connect=0.5, reconnect=60.0))
        with pytest.raises(Unreachable, match=re.escape(worker.address.removeprefix("mesh://"))):
            with split(quick.path, ":1", [worker.address], plugins, settings=settings):
                pass
