"""Spans as people write them."""

from __future__ import annotations

import pytest

from mesh_core.errors import PlanError
from mesh_core.model.spans import BlockSpan


@pytest.mark.parametrize(
    ("text", "start", "stop"),
    [(":", 0, 8), (":3", 0, 3), ("3:", 3, 8), ("2:5", 2, 5), (" 2 : 5 ", 2, 5), (":0", 0, 0), ("8:", 8, 8)],
)
def test_spans_are_written_like_slices(text: str, start: int, stop: int) -> None:
    assert BlockSpan.parse(text, 8) == BlockSpan(start, stop)


@pytest.mark.parametrize("text", ["", "3", "a:b", "1:2:3", "-1:", "1.5:2", ":9", "9:", "5:2", "9" * 5000 + ":"])
def test_what_is_no_span_of_the_model_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        BlockSpan.parse(text, 8)
    assert ":" in caught.value.hint


def test_the_error_of_a_span_past_the_end_says_how_many_blocks_there_are() -> None:
    with pytest.raises(PlanError, match=r"8 blocks \(0 to 7\)"):
        BlockSpan.parse("4:12", 8)


def test_written_out_a_span_reads_back() -> None:
    assert BlockSpan.parse(str(BlockSpan(2, 5)), 8) == BlockSpan(2, 5)


def test_membership_and_overlap_are_half_open() -> None:
    span = BlockSpan(2, 5)
    assert [b for b in range(8) if b in span] == [2, 3, 4]
    assert span.overlaps(BlockSpan(4, 6)) and not span.overlaps(BlockSpan(5, 6))
    assert not span.overlaps(BlockSpan(3, 3)), "an empty span needs nothing"
