"""The step benchmark beside bare ZeroMQ, and two checkouts beside each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import ROOT
from benchmarks.side_by_side import environment, table
from benchmarks.step import BARE_COLUMNS, BARE_LEGEND, measure
from mesh_core.bench import step_report
from mesh_core.errors import ConfigError


@pytest.mark.parametrize("encrypted", [False, True])
def test_steps_and_turns_of_the_bare_ring_are_measured_together(
    encrypted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESH_HOME", str(tmp_path))
    (found,) = measure([(1, 16, 512)], 3, encrypted=encrypted)
    assert (found.steps, found.encrypted, found.state_bytes) == (3, encrypted, 16 * 512 * 2)
    assert 0 < found.overhead_ms < found.total_ms
    assert found.bare_ms > 0
    text = step_report.table([found], BARE_COLUMNS, BARE_LEGEND)
    assert "bare pyzmq" in text and f"{found.beyond_bare_ms:.2f}" in text


def test_the_ratio_is_of_medians_over_the_rounds() -> None:
    case = 1_000_000, True

    def runs(*overheads: float) -> list[dict[tuple[int, bool], dict[str, float]]]:
        return [{case: {"overhead_ms": ms, "total_ms": 10 * ms}} for ms in overheads]

    row = table(("old", "new"), (runs(1, 2, 50), runs(1, 1, 3))).splitlines()[1]
    assert row.split() == ["1.0", "CURVE", "2.00", "1.00", "0.50", "20.0", "10.0", "0.50"]


def test_what_is_measured_is_the_checkout_that_was_named(tmp_path: Path) -> None:
    assert str(ROOT / "mesh_core") in environment(ROOT, tmp_path)["PYTHONPATH"]
    with pytest.raises(ConfigError, match="holds no mesh_core"):
        environment(tmp_path, tmp_path)
