"""Hosts and workers of one machine hand states over in memory: bit for bit, and whoever is killed leaves nothing."""

from __future__ import annotations

import gc
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import pytest
import torch

from mesh_core.plugins.registry import Plugins
from tests.faults.conftest import IMPATIENT, Case
from tests.faults.processes import LoneHost, workers
from tests.support.splitting import split
from tests.support.workers import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has memory without a name")


def shared_by(process: int) -> int:
    """How often a process has shared memory mapped."""
    return Path(f"/proc/{process}/maps").read_text().count("memfd:comfyui-mesh")


def entries() -> set[str]:
    """Names of shared memory on this machine, but for the semaphores with which tests watch their processes."""
    found = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    return {name for name in found if not name.startswith("sem.")}


def test_states_cross_in_memory_and_the_choice_sees_how_fast_that_is(slow: Case, plugins: Plugins) -> None:
    """Through a chain, each way: host to worker, worker to worker, worker to host."""
    with workers(slow.path.parent, 2, IMPATIENT) as pair:
        with split(slow.path, ":1", [w.address for w in pair], plugins, settings=IMPATIENT) as runner:
            for _ in range(3):
                assert torch.equal(runner(slow.inputs), slow.expected)
            step = runner.stats.steps[-1]
            assert step.codec == "raw"
            assert step.reason.startswith("shared memory measured") and "raw" in step.reason
            assert "shared memory" in runner.stats.table()
            assert all(shared_by(w.process.pid) for w in pair if w.process.pid)


def test_hosts_killed_at_any_moment_leave_nothing(slow: Case, quick: Case, plugins: Plugins) -> None:
    before, dice = entries(), random.Random(5)
    with workers(slow.path.parent, 1, IMPATIENT) as (worker,):
        pid = worker.process.pid
        assert pid is not None
        for _ in range(6):
            host = LoneHost(slow.path, worker.address, quick.inputs, IMPATIENT)
            host.wait_for_step()
            sleep(dice.uniform(0, 0.2))
            assert shared_by(pid) > 0
            host.kill()
        wait_until(lambda: shared_by(pid) == 0, 15, "memory of dead hosts to be let go")
        assert entries() == before
        with split(slow.path, ":1", [worker.address], plugins, settings=IMPATIENT) as runner:
            assert torch.equal(runner(slow.inputs), slow.expected)


def test_workers_killed_at_any_moment_leave_nothing(slow: Case, plugins: Plugins) -> None:
    before, own, dice = entries(), shared_by(os.getpid()), random.Random(6)
    with workers(slow.path.parent, 2, IMPATIENT) as pair, ThreadPoolExecutor(1) as pool:
        with split(slow.path, ":1", [w.address for w in pair], plugins, settings=IMPATIENT) as runner:
            for _ in range(4):
                step = pool.submit(runner, slow.inputs)
                sleep(dice.uniform(0, 0.5))
                dice.choice(pair).restart()
                assert torch.equal(step.result(60), slow.expected)
            assert torch.equal(runner(slow.inputs), slow.expected)
            assert runner.stats.steps[-1].reason.startswith("shared memory")
            # Results are views of memory of the connection over which they came.
            del step
            # Two connections to each worker, of which each has one mapping.
            wait_until(lambda: gc.collect() >= 0 and shared_by(os.getpid()) - own <= 4, 5, "old memory to be let go")
    assert entries() == before
