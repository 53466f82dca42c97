"""Plans: what users write, what is filled in, and what is proposed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_core.builtin.split import DefaultSplit
from mesh_core.errors import PlanDoesNotFit, PlanError
from mesh_core.model.plan import Hop, Plan, WorkerInfo, check, make
from mesh_core.model.sizes import RESERVE, divide, fitting, span_bytes
from mesh_core.model.spans import BlockSpan
from tests.support.specs import spec


def spans(plan: Plan) -> list[str]:
    return [str(hop.span) for hop in plan.hops]


def test_what_is_left_is_shared_evenly() -> None:
    assert spans(make(spec([10] * 12), ":3", [None] * 3)) == ["0:3", "3:6", "6:9", "9:12"]


def test_shares_are_even_in_bytes_not_in_blocks() -> None:
    assert spans(make(spec([30, 30, 10, 10, 10, 10, 10, 10]), ":0", [None, None])) == ["0:0", "0:2", "2:8"]


def test_given_spans_stand_and_the_others_fill_the_gaps() -> None:
    assert spans(make(spec([10] * 12), ":2", [None, None, "8:10", None])) == ["0:2", "2:5", "5:8", "8:10", "10:12"]


def test_everything_here_or_nothing_here_are_ordinary_plans() -> None:
    everything, nothing = make(spec([1] * 4), ":", [None]), make(spec([1] * 4), ":0", [None])
    assert everything.remote == () and len(everything.local) == 4
    assert [h.span for h in nothing.remote] == [BlockSpan(0, 4)] and len(nothing.local) == 0


def test_more_workers_than_blocks_leaves_some_without_work() -> None:
    plan = make(spec([1] * 3), ":1", [None] * 5)
    assert sum(len(h.span) for h in plan.remote) == 2 and all(len(h.span) == 1 for h in plan.remote)


@pytest.mark.parametrize(
    ("local", "given_spans", "says"),
    [
        (":2", ["3:"], "block 2 is expected next, 3:8 starts at 3"),
        (":4", ["3:"], "block 4 is expected next"),
        (":2", ["2:5", "6:8"], "block 5 is expected next"),
        (":2", ["2:5"], "Blocks 5:8 run nowhere"),
        (":2", [], "Blocks 2:8 run nowhere"),
        ("1:3", ["3:"], "block 0 is expected next"),
        (":4", [None, "2:"], "block 4 is expected next"),
        (":9", [None], "8 blocks"),
    ],
)
def test_gaps_and_overlaps_are_named_with_a_hint(local: str, given_spans: list[str | None], says: str) -> None:
    with pytest.raises(PlanError) as caught:
        make(spec([10] * 8), local, given_spans)
    assert says in str(caught.value) and caught.value.hint


@pytest.mark.parametrize("workers", [[1, 0], [0, 0], [0, 2], [0, -1]])
def test_a_proposal_that_puts_the_host_anywhere_but_first_is_refused(workers: list[int]) -> None:
    hops = [Hop(BlockSpan(0, 2), workers[0]), Hop(BlockSpan(2, 4), workers[1])]
    with pytest.raises(PlanError):
        check(spec([1] * 4), hops, 1)


sizes = st.lists(st.integers(1, 50), min_size=1, max_size=20)


@given(sizes, st.lists(st.floats(0.1, 10), min_size=1, max_size=6))
def test_a_division_covers_its_span_in_order(blocks: list[int], weights: list[float]) -> None:
    parts = divide(spec(blocks), BlockSpan(0, len(blocks)), weights)
    assert len(parts) == len(weights)
    assert [b for p in parts for b in range(p.start, p.stop)] == list(range(len(blocks)))


@given(sizes, st.integers(0, 100), st.integers(0, 100), st.integers(0, 3000))
def test_the_host_is_told_the_most_blocks_that_fit(blocks: list[int], shared: int, edges: int, memory: int) -> None:
    model = spec(blocks, shared=shared, edges=edges)
    k = fitting(model, memory, reserve=100)
    assert k == 0 or span_bytes(model, BlockSpan(0, k)) + 100 <= memory
    if k < len(blocks):
        assert span_bytes(model, BlockSpan(0, k + 1)) + 100 > memory


def propose(model_sizes: list[int], free: list[int | None], **kwargs: object) -> Plan:
    model = spec(model_sizes, **kwargs)  # type: ignore[arg-type]
    infos = [WorkerInfo(f"w{i}", f) for i, f in enumerate(free)]
    hops = DefaultSplit().mesh_propose_split(model, infos, [None] * len(infos))
    assert hops is not None
    return check(model, hops, len(free) - 1)


def test_the_proposal_fills_the_host_first_and_shares_the_rest_by_free_memory() -> None:
    assert spans(propose([10] * 12, [RESERVE + 60, 200, 100])) == ["0:3", "3:9", "9:12"]


def test_a_host_without_room_gets_nothing_and_one_alone_gets_all() -> None:
    assert spans(propose([10] * 4, [0, 200])) == ["0:0", "0:4"]
    assert spans(propose([10] * 4, [0])) == ["0:4"]


def test_float32_weights_count_four_bytes() -> None:
    assert spans(propose([10] * 6, [RESERVE + 120, 1000], dtype="F32")) == ["0:3", "3:6"]


def test_a_model_that_fits_nowhere_says_how_much_is_missing() -> None:
    with pytest.raises(PlanDoesNotFit, match="worker"):
        propose([10] * 12, [RESERVE + 60, 40, 40])


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=16),
    st.lists(st.integers(0, 1500), min_size=1, max_size=4),
    st.integers(0, 40),
    st.integers(0, 40),
)
def test_every_proposal_fits(blocks: list[int], free: list[int], shared: int, edges: int) -> None:
    model = spec(blocks, shared=shared, edges=edges)
    try:
        plan = propose(blocks, [RESERVE, *free], shared=shared, edges=edges)
    except PlanDoesNotFit:
        assert not _some_plan_fits(model, free)
        return
    for hop in plan.remote:
        assert span_bytes(model, hop.span) <= free[hop.worker - 1]


def _some_plan_fits(model: object, free: list[int]) -> bool:
    """Whether contiguous spans in the workers' order can hold the model; each taking all it can is best."""
    position = 0
    for memory in free:
        stops = range(position, model.blocks + 1)  # type: ignore[attr-defined]
        position = max(s for s in stops if span_bytes(model, BlockSpan(position, s)) <= memory)  # type: ignore[arg-type]
    return position == model.blocks  # type: ignore[attr-defined]
