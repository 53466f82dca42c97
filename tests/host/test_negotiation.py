"""The choice of codec in a running session: on a link that changes, and against plugins."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from mesh_codec.base import CodecChoice, Quality
from mesh_codec.raw import RawCodec
from mesh_core.errors import PlanError
from mesh_core.hookspecs import hookimpl
from mesh_core.host import choices
from tests.support.negotiating import (
    SLOW,
    Brings,
    Deflate,
    over,
    plugins_with,
    run,
    shaped,
    state,
    used,
)
from tests.support.workers import ThreadWorker, wait_until


def test_a_link_that_slows_down_changes_the_codec_and_not_the_result(tmp_path: Path, start: Any) -> None:
    plugins = plugins_with(Brings(RawCodec(), Deflate()), standard=False)
    workers = start(plugins)
    with shaped(workers[0]) as (link, address), over(tmp_path, workers, plugins, address=address) as session:
        for step in range(3):
            assert torch.equal(run(session, state(seed=step), sequence=str(step % 2)), state(seed=step))
        assert used(session)[-1] == "raw"
        link.rate = SLOW
        for step in range(3, 9):
            assert torch.equal(run(session, state(seed=step), sequence=str(step % 2)), state(seed=step))
        assert used(session)[-1] == "deflate"
        slow, last = session.stats.steps[3], session.stats.steps[-1]
        assert last.total_ms < slow.total_ms
        assert last.reason.startswith("link measured ") and "deflate" in last.reason
        assert [s.resent for s in session.stats.steps] == [0] * 9 and session.stats.reconnects == 0
        assert session.stats.table().count(last.reason) == 1


def test_a_slow_link_is_coded_from_the_first_step(tmp_path: Path, start: Any) -> None:
    plugins = plugins_with()
    workers = start(plugins)
    with shaped(workers[0]) as (link, address):
        link.rate = SLOW
        wait_until(lambda: "entropy" in _surveyed(workers[0]), 30, "the survey of codecs")
        with over(tmp_path, workers, plugins, address=address, quality="fast") as session:
            assert (run(session, state()) - state()).abs().max() < 0.5
            (step,) = session.stats.steps
            assert step.codec != "raw" and step.hops[0].in_coded < 0.9 * step.hops[0].in_raw


def test_a_chain_measures_its_own_links(tmp_path: Path, start: Any) -> None:
    plugins = plugins_with()
    workers = start(plugins, 3)
    with over(tmp_path, workers, plugins) as session:
        remotes = session.remotes
        known = [session._opener.links._measured[a, b] for a, b in pairwise(remotes)]
        assert len(known) == 2 and all(link.bandwidth > 1e6 for link in known)
        assert torch.equal(run(session, state()), state())
        assert session.stats.steps[0].reason.count("measured") >= 1


class Stubborn:
    """Chooses whatever the link; of the arguments it takes those that it needs."""

    def __init__(self, codec: str) -> None:
        self.codec = codec

    @hookimpl
    def mesh_choose_codec(self, role: str, quality: Quality) -> CodecChoice | None:
        settings = {"level": 6} if self.codec == "deflate" else {}
        return CodecChoice(self.codec, settings, "as the plugin says") if role == "hidden" else None


def test_a_plugin_that_chooses_wins(tmp_path: Path, start: Any) -> None:
    plugins = plugins_with(Brings(Deflate()), Stubborn("deflate"))
    workers = start(plugins, scheme="inproc")
    with over(tmp_path, workers, plugins) as session:
        for _ in range(3):
            assert torch.equal(run(session, state()), state())
        assert {(s.codec, s.reason) for s in session.stats.steps} == {("deflate", "as the plugin says")}


def test_a_plugin_may_change_its_mind_at_every_step(tmp_path: Path, start: Any) -> None:
    stubborn = Stubborn("deflate")
    plugins = plugins_with(Brings(Deflate()), stubborn)
    workers = start(plugins, 2)
    with over(tmp_path, workers, plugins) as session:
        for step in range(4):
            stubborn.codec = ("raw", "deflate")[step % 2]
            assert torch.equal(run(session, state(seed=step)), state(seed=step))
        assert used(session) == ["raw", "deflate"] * 2
        assert session.stats.reconnects == 0 and not any(s.resent for s in session.stats.steps)


class Counting(Stubborn):
    """Counts how often it is asked."""

    asked = 0

    @hookimpl
    def mesh_choose_codec(self, role: str, quality: Quality) -> CodecChoice | None:
        self.asked += 1
        return super().mesh_choose_codec(role, quality)


def test_a_choice_that_has_settled_is_looked_at_once_in_a_while(
    tmp_path: Path, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting("deflate")
    plugins = plugins_with(Brings(Deflate()), counting)
    monkeypatch.setattr(Deflate, "takes", 0.0)
    monkeypatch.setattr(choices, "_LOOK_AGAIN", 1e9)
    (worker,) = start(plugins, scheme="inproc")
    # The model computes in float32; what its state takes in bytes says nothing of how many elements it has.
    small, large = state(1024).bfloat16(), state(2048).bfloat16()
    with over(tmp_path, [worker], plugins) as session:
        for _ in range(choices.LEARNING):
            assert torch.equal(run(session, small), small)
        settled = counting.asked
        for _ in range(5):
            run(session, small)
        assert counting.asked == settled
        run(session, large)
        other_size = counting.asked
        assert other_size > settled
        for tensor in (small, large, small, large):
            assert torch.equal(run(session, tensor, str(tensor.numel())), tensor)
        assert counting.asked == other_size
        monkeypatch.setattr(choices, "_LOOK_AGAIN", 0.0)
        counting.codec = "raw"
        assert torch.equal(run(session, small), small)
        assert used(session)[-2:] == ["deflate", "raw"]


def test_a_link_that_slows_down_changes_a_choice_that_has_settled(tmp_path: Path, start: Any) -> None:
    plugins = plugins_with(Brings(RawCodec(), Deflate()), standard=False)
    workers = start(plugins)
    with shaped(workers[0]) as (link, address), over(tmp_path, workers, plugins, address=address) as session:
        for step in range(choices.LEARNING + 4):
            run(session, state(seed=step))
        assert set(used(session)) == {"raw"}
        link.rate = SLOW
        for step in range(8):
            assert torch.equal(run(session, state(seed=step)), state(seed=step))
        assert used(session)[-1] == "deflate"


def test_a_codec_by_name_is_used_whatever_the_link(tmp_path: Path, start: Any) -> None:
    plugins = plugins_with(Brings(Deflate()))
    workers = start(plugins, scheme="inproc")
    with over(tmp_path, workers, plugins, codec="deflate") as session:
        assert torch.equal(run(session, state()), state())
        assert used(session) == ["deflate"]
    with pytest.raises(PlanError, match="'entropy'"), over(tmp_path, workers, plugins, codec="entropy"):
        pass


def test_opening_tells_how_fast_the_worker_codes(tmp_path: Path, start: Any) -> None:
    plugins = plugins_with()
    workers = start(plugins, scheme="inproc")
    wait_until(lambda: _surveyed(workers[0]) >= {"entropy"}, 20, "the survey of codecs")
    with over(tmp_path, workers, plugins) as session:
        assert {codec for codec, _ in session._opener.speeds.end(session.remotes[0]).claimed} >= {"entropy"}


def _surveyed(worker: ThreadWorker) -> set[str]:
    return {entry["codec"] for entry in worker.worker.speeds.plain()}
