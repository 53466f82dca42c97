"""A forked process is told that the session is its parent's, at once, and does not disturb its parent."""

from __future__ import annotations

import multiprocessing
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
    """What ``work`` gives in a forked process, which must not take more than a minute."""
    if "fork" not in multiprocessing.get_all_start_methods():
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
        calls = [pipelines.run, lambda p: klein.split(p, ":1"), lambda p: mesh_core.set_loras(p, [])]
        for call in calls:
            with pytest.raises(SessionError) as told:
                call(pipe)
            said.append(str(told.value))
        return said

    said = in_a_fork(child)
    assert len(said) == 3 and all("forked" in text and "spawn" in text for text in said)
    assert torch.equal(run_split(pipe), expected)
    mesh_core.unsplit(pipe)


def test_a_fork_puts_the_model_together_and_its_parent_goes_on(klein: SplitKlein) -> None:
    expected = pipelines.run(klein.whole())
    pipe = klein.split(klein.whole())
    assert torch.equal(run_split(pipe), expected)

    def child() -> bool:
        mesh_core.unsplit(pipe)
        return torch.equal(pipelines.run(pipe), expected)

    assert in_a_fork(child) is True
    assert torch.equal(run_split(pipe), expected)
    mesh_core.unsplit(pipe)
