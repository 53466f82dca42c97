"""Hosts that die, stop waiting or change their mind: the worker computes for others at once."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel

from mesh_core.errors import PlanDoesNotFit, TransportTimeout
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Deadlines, WorkerSettings
from tests.adapters import tiny
from tests.faults.conftest import IMPATIENT, Case
from tests.faults.processes import FastWorker, LoneHost, slow_model, workers
from tests.support.splitting import split
from tests.support.workers import wait_until


def test_a_host_that_dies_in_a_step(quick: Case, endless: dict[str, Any], steady: FastWorker, plugins: Plugins) -> None:
    host = LoneHost(quick.path, steady.address, endless, IMPATIENT)
    host.wait_for_step()
    steady.wait_for_work(0.5)
    host.kill()
    wait_until(steady.idle, 10, "freeing the worker")
    with split(quick.path, ":1", [steady.address], plugins) as runner:
        assert torch.equal(runner(quick.inputs), quick.expected)


def test_a_host_that_slept_in_a_step_sends_it_again(case: Callable[..., Case]) -> None:
    """The worker stops the step of a host that fell silent; the host, awake again, does not fail for that."""
    long = case(height=48, width=40, batch=4)
    with workers(long.path.parent, 1, replace(IMPATIENT, worker=WorkerSettings(orphaned_after=0.6))) as (worker,):
        host = LoneHost(long.path, worker.address, long.inputs, IMPATIENT)
        host.wait_for_step()
        worker.wait_for_work(0.3)
        host.pause()
        wait_until(worker.idle, 10, "freeing the worker")
        host.resume()
        assert host.results.poll(20)
        resent, output = host.results.recv()
        host.kill()
        assert resent >= 1 and torch.equal(output, long.expected)


def test_interrupting_a_step_frees_the_worker(
    quick: Case, endless: dict[str, Any], steady: FastWorker, plugins: Plugins
) -> None:
    def interrupt() -> None:
        steady.wait_for_work(0.5)
        _thread.interrupt_main()

    with split(quick.path, ":0", [steady.address], plugins) as runner:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            runner(endless)
        thread.join()
        wait_until(steady.idle, 6, "freeing the worker")
        assert torch.equal(runner(quick.inputs), quick.expected)
        assert runner.stats.reconnects == 0


def test_a_host_that_gives_up_while_a_stage_loads(quick: Case, steady: FastWorker, plugins: Plugins) -> None:
    class ClosedWindow(Exception): ...

    def report(*_: object) -> None:
        raise ClosedWindow

    with pytest.raises(ClosedWindow), split(quick.path, ":2", [steady.address], plugins, report=report):
        pass
    with split(quick.path, ":2", [steady.address], plugins) as runner:
        assert torch.equal(runner(quick.inputs), quick.expected)


def test_a_step_that_passes_its_deadline(
    quick: Case, endless: dict[str, Any], steady: FastWorker, plugins: Plugins
) -> None:
    hasty = replace(IMPATIENT, deadlines=Deadlines(step=3.0))
    with split(quick.path, ":0", [steady.address], plugins, settings=hasty) as runner:
        with pytest.raises(TransportTimeout, match=r"step 1 from w0 .* within 3 s") as caught:
            runner(endless)
        assert "deadline" in caught.value.hint
        wait_until(steady.idle, 6, "freeing the worker")
        assert torch.equal(runner(quick.inputs), quick.expected)


def test_what_dead_hosts_held_makes_room_for_others(tmp_path: Path, plugins: Plugins) -> None:
    """A host that was killed cannot close its session; its memory is given to the next model that needs it."""
    folder = tmp_path / "models"
    first, second = slow_model(folder / "first", seed=1), slow_model(folder / "second", seed=2)
    one_model = sum(f.stat().st_size for f in first.glob("*.safetensors"))
    settings = replace(IMPATIENT, worker=WorkerSettings(yields_after=0.5))
    host = tiny.inputs(guidance=False)
    with workers(folder, 1, settings, memory=one_model * 3 // 2) as (worker,):
        dead = LoneHost(first, worker.address, host, IMPATIENT)
        dead.wait_for_step()
        with pytest.raises(PlanDoesNotFit, match="other sessions"), split(second, ":0", [worker.address], plugins):
            pass
        dead.kill()
        sleep(0.6)
        with split(second, ":0", [worker.address], plugins) as runner:
            whole = Flux2Transformer2DModel.from_pretrained(second)
            with torch.no_grad():
                assert torch.equal(runner(host), whole(**host, return_dict=False)[0])
