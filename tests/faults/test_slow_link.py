"""A link that takes longer for a state than a worker may be silent: slow is not lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Heartbeat
from tests.faults.conftest import IMPATIENT, Case
from tests.faults.processes import FastWorker
from tests.support.faulty_link import faulty_link
from tests.support.splitting import split


def test_a_state_that_takes_long_to_cross(case: Callable[..., Case], steady: FastWorker, plugins: Plugins) -> None:
    large = case(height=48, width=40)
    settings = replace(IMPATIENT, heartbeat=Heartbeat(interval=0.1, lost_after=0.6))
    state_bytes = (48 * 40 + 7) * 64 * 4
    with faulty_link(steady.address, state_bytes / 2.0) as link:
        with split(large.path, ":12", [link.address], plugins, settings=settings) as runner:
            assert torch.equal(runner(large.inputs), large.expected)
            (step,) = runner.stats.steps
            assert step.wire_ms > 1200 and step.resent == 0 and runner.stats.reconnects == 0
