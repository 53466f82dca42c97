"""One member that takes all it can get, and an honest one beside it who notices nothing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import pytest
import torch

from mesh_core.plugins.registry import Plugins
from tests.faults.conftest import IMPATIENT, TALKATIVE, Case
from tests.faults.greedy import WAYS, Attacker
from tests.faults.honest import kinds, member, record, some_lora, undisturbed
from tests.faults.processes import workers
from tests.support.splitting import checkpoint_at, split

_WELL_BEGUN = 1.5
"""Seconds after which an attack is under way."""

_MORE_MEMORY = 400 << 20


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_an_honest_member_notices_nothing(
    quick: Case, plugins: Plugins, tmp_path: Path, way: Callable[[Attacker], None]
) -> None:
    model = checkpoint_at(quick.path, plugins)
    with workers(quick.path.parent, 1, IMPATIENT) as (worker,):
        recorded = kinds(record(quick, worker.address, plugins, some_lora(model)))
        before = worker.resident()
        with member(worker.address, tmp_path / "greedy") as remote, undisturbed(quick, worker.address, plugins, 4):
            with ThreadPoolExecutor(1) as pool:
                attacker = Attacker(remote.channel, recorded, worker, model, plugins, tmp_path)
                attack = pool.submit(way, attacker)
                sleep(_WELL_BEGUN)
                try:
                    with split(quick.path, ":2", [worker.address], plugins, settings=TALKATIVE) as late:
                        assert torch.equal(late(quick.inputs), quick.expected), "a session can still be opened"
                finally:
                    attacker.over.set()
                attack.result(60)
            assert worker.resident() - before < _MORE_MEMORY
