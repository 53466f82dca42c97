"""One model, its undisturbed results, and workers that no test kills."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel

from mesh_core.builtin import load_plugins
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Deadlines, Heartbeat, Settings, WorkerSettings
from tests.adapters import tiny
from tests.faults.processes import FastWorker, slow_model, workers

IMPATIENT = Settings(
    worker=WorkerSettings(orphaned_after=2.0),
    heartbeat=Heartbeat(interval=0.2, lost_after=1.0),
    deadlines=Deadlines(connect=5.0, load=30.0, step=60.0, reconnect=20.0),
)
"""For hosts and workers in one machine, so that tests need not wait for long."""

TALKATIVE = replace(IMPATIENT, heartbeat=Heartbeat(interval=0.2, lost_after=20.0))
"""For hosts that are to be disturbed by nothing: heard often by a worker, and in no hurry when it is busy."""


@dataclass(frozen=True)
class Case:
    """A model on disk, inputs of forward(), and what it gives for them."""

    path: Path
    inputs: dict[str, Any]
    expected: torch.Tensor


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    return load_plugins()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return slow_model(tmp_path_factory.mktemp("models") / "klein")


@pytest.fixture(scope="session")
def case(model: Path) -> Callable[..., Case]:
    """Makes a case with inputs of ``height`` x ``width`` tokens; the same one is made once."""
    made: dict[str, Case] = {}
    whole = Flux2Transformer2DModel.from_pretrained(model)

    def make(**size: int) -> Case:
        inputs = tiny.inputs(guidance=False, **size)
        if str(size) not in made:
            with torch.no_grad():
                made[str(size)] = Case(model, inputs, whole(**inputs, return_dict=False)[0])
        return made[str(size)]

    return make


@pytest.fixture(scope="session")
def quick(case: Callable[..., Case]) -> Case:
    """A step of some milliseconds."""
    return case(height=4, width=4)


@pytest.fixture(scope="session")
def slow(case: Callable[..., Case]) -> Case:
    """A step of a second or two, in which much can happen."""
    return case(height=48, width=40)


@pytest.fixture(scope="session")
def endless() -> dict[str, Any]:
    """Inputs of a step that takes longer than any test."""
    return tiny.inputs(guidance=False, height=64, width=64, batch=8)


@pytest.fixture(scope="session")
def steady(model: Path) -> Iterator[FastWorker]:
    """A worker that outlives all that is done to it."""
    with workers(model.parent, 1, IMPATIENT) as (worker,):
        yield worker
        assert worker.process.is_alive()
