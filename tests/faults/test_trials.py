"""A few generations with random faults; `python -m tests.faults.long trials` runs hundreds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mesh_codec.base import Quality
from mesh_core.plugins.registry import Plugins
from tests.faults.conftest import IMPATIENT, Case
from tests.faults.trials import Summary, trials

SEEDS = range(8)


@pytest.mark.parametrize("quality", ["lossless", "transparent"])
def test_a_generation_with_faults_ends_as_it_would_have(
    case: Callable[..., Case], plugins: Plugins, quality: Quality
) -> None:
    medium = case(height=16, width=16)
    summary = Summary()
    with trials(medium.path, medium.inputs, plugins, IMPATIENT, quality) as chain:
        for seed in SEEDS:
            summary.add(chain.run(seed))
    assert not summary.lost and not summary.differing
    if quality == "lossless":
        assert not summary.within_quality, "without loss there is one result"
