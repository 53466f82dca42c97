"""A forked process is told that the session is its parent's, at once, and does not disturb its parent."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import mesh_core
from mesh_core.errors import SessionError
from tests.support import pipelines
from tests.support.split_klein import SplitKlein, run_split, split_klein


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SplitKlein]:
    with split_klein(tmp_path_factory.mktemp("models"), "mesh") as klein:
        yield klein


def in_a_fork(work: Callable[[], Any]) -> Any:
    """What ``work`` gives in a forked process, which must not take a minute; None but on Linux."""
    if sys.platform != "linux":  # macOS kills forks whose parent used its frameworks, Windows has none
        return None
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=lambda: theirs.send(work()))
    process.start()
    try:
        assert ours.poll(60), "the forked process hangs"
        return ours.recv()
    finally:
        process.kill()
        process.join(10)


def test_generating_in_a_fork_is_refused_at_once_and_its_parent_goes_on(klein: SplitKlein) -> None:
    expected = pipelines.run(klein.whole())
    pipe = klein.split(klein.whole())
    assert torch.equal(run_split(pipe), expected)

    def child() -> list[str]:
        said: list[str] = []
        calls = [pipelines.run, lambda p: mesh_core.set_loras(p, [])]
        for call in calls:
            with pytest.raises(SessionError) as told:
                call(pipe)
            said.append(str(told.value))
        return said

    said = in_a_fork(child)
    assert said is None or (len(said) == 2 and all("forked" in text and "spawn" in text for text in said))
    assert torch.equal(run_split(pipe), expected)
    mesh_core.unsplit(pipe)


@pytest.mark.parametrize("what", ["puts it together", "splits it anew", "splits another"])
def test_a_fork_goes_its_own_way_and_its_parent_goes_on(klein: SplitKlein, what: str) -> None:
    expected = pipelines.run(klein.whole())
    pipe = klein.split(klein.whole(), codec="lossless")
    assert torch.equal(run_split(pipe), expected)

    def child() -> bool:
        if what == "puts it together":
            return torch.equal(pipelines.run(mesh_core.unsplit(pipe)), expected)
        own = klein.split(pipe if what == "splits it anew" else klein.whole(), ":1", codec="lossless")
        return torch.equal(run_split(own), expected)

    assert in_a_fork(child) in (True, None)
    assert torch.equal(run_split(pipe), expected)
    mesh_core.unsplit(pipe)
