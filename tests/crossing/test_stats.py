"""What people read about their steps."""

from __future__ import annotations

import pytest

from mesh_core.crossing.stats import HopStats, RunStats, StepStats


def hop(worker: str = "attic", **values: float) -> HopStats:
    return HopStats(worker=worker, span="4:8", **values)  # type: ignore[arg-type]


def test_a_report_of_a_worker_is_read_with_care() -> None:
    report = {"worker": "attic", "in_raw": "many", "compute_ms": 3, "queue_ms": 1.5, "surprise": [1], "out_raw": 2.5}
    read = HopStats.from_trace(report)
    assert (read.worker, read.compute_ms, read.queue_ms) == ("attic", 3, 1.5)
    assert read.in_raw == 0 and read.out_raw == 0


@pytest.mark.parametrize("value", [True, -1, float("nan"), float("inf"), 1e308, 1 << 62, 10**30])
@pytest.mark.parametrize("name", ["in_coded", "compute_ms"])
def test_numbers_that_no_step_costs_count_as_nothing(name: str, value: float) -> None:
    assert getattr(HopStats.from_trace({name: value}), name) == 0


def test_large_steps_are_read_as_they_are() -> None:
    read = HopStats.from_trace({"in_raw": (1 << 53) - 1, "busy_ms": 999_999_999.0, "queue_ms": 0})
    assert (read.in_raw, read.busy_ms, read.queue_ms) == ((1 << 53) - 1, 999_999_999.0, 0)


def test_overhead_is_what_is_left_after_compute_codec_and_wire() -> None:
    hops = [hop(compute_ms=50, encode_ms=3, decode_ms=2), hop(compute_ms=20, encode_ms=1, decode_ms=1)]
    step = StepStats(1, total_ms=100, encode_ms=4, decode_ms=5, wire_ms=10, hops=hops)
    assert step.overhead_ms == 100 - 4 - 5 - 10 - 55 - 22


def test_the_table_has_a_row_per_worker_and_medians_of_all_steps() -> None:
    run = RunStats(constants_bytes=2_000_000)
    for compute in (10.0, 20.0, 900.0):
        hops = [
            hop("attic", compute_ms=compute, in_raw=4000, in_coded=1000),
            hop("cellar", out_coded=500, in_coded=300),
        ]
        run.steps.append(StepStats(len(run.steps), total_ms=100, hops=hops, codec="entropy", reason="quality fast"))
    lines = run.table().splitlines()
    attic, cellar = (next(line for line in lines if line.startswith(n)) for n in ("attic", "cellar"))
    assert attic.split()[:4] == ["attic", "4:8", "1.0", "4.0"] and "20.0" in attic.split()
    assert "0.5" in cellar.split()
    assert "3 steps" in lines[-2] and "quality fast" in lines[-1] and "2.00 MB of constants" in lines[-1]
    assert "sent again" not in run.table()


def test_reconnects_and_resent_steps_are_told() -> None:
    run = RunStats([StepStats(1, hops=[hop()], resent=2)], reconnects=1)
    assert "1 reconnects, 2 steps sent again" in run.table()


def test_nothing_remote_and_a_cleared_run_say_so() -> None:
    run = RunStats([StepStats(1, hops=[hop()])], constants_bytes=5, reconnects=2)
    run.clear()
    assert run.table() == "no steps crossed a cut"
    assert (run.constants_bytes, run.reconnects) == (0, 0)


def test_steps_of_chains_of_other_lengths_fit_in_one_table() -> None:
    run = RunStats([StepStats(1, hops=[hop("a")]), StepStats(2, hops=[hop("a"), hop("b")])])
    assert [line.split()[0] for line in run.table().splitlines()[1:3]] == ["a", "b"]
