"""Links of a chain that break or fall silent: the generation has the bits that it would have had, with a codec that
predicts each step from the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

import pytest
import torch
from torch import Tensor

from mesh_codec import EntropyCodec
from mesh_core.builtin import load_plugins
from mesh_core.host import hops
from mesh_core.host.flight import Flight
from mesh_core.host.runner import SplitRunner
from mesh_core.plugins.registry import Plugins
from tests.adapters import tiny
from tests.faults.conftest import IMPATIENT
from tests.support.choosing import always_entropy
from tests.support.faulty_link import FaultyLink, faulty_link
from tests.support.splitting import split
from tests.support.workers import ThreadWorker, thread_workers, wait_until

STEPS = 7
DISTURBED = 4
SETTINGS = replace(IMPATIENT, deadlines=replace(IMPATIENT.deadlines, connect=1.0))
"""A step has 60 s: whoever waits for its deadline is noticed."""


@dataclass
class Chain:
    """Two workers in a chain, and links that things may happen to.

    Attributes:
        first, last: the host's to each worker. between: from the first worker to the last.
    """

    path: Path
    plugins: Plugins
    workers: list[ThreadWorker]
    first: FaultyLink
    last: FaultyLink
    between: FaultyLink

    def picture(self, disturb: Callable[[SplitRunner], None] | None = None) -> tuple[Tensor, SplitRunner]:
        return drawn(self.path, [self.first.address, self.last.address], self.plugins, disturb)


def drawn(
    path: Path, addresses: list[str], plugins: Plugins, disturb: Callable[[SplitRunner], None] | None = None
) -> tuple[Tensor, SplitRunner]:
    """The end of a generation in which every step depends on all before it."""
    start = tiny.inputs(guidance=False, height=16, width=16)
    latents = start["hidden_states"]
    with split(path, ":1", addresses, plugins, quality="transparent", settings=SETTINGS) as run:
        for step in range(STEPS):
            if step == DISTURBED and disturb is not None:
                disturb(run)
            time = torch.tensor([1 - step / STEPS])
            latents = latents - 0.1 * run({**start, "hidden_states": latents, "timestep": time})
    return latents, run


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved(tmp_path_factory.mktemp("models") / "klein", doubles=1, singles=4)


@pytest.fixture(scope="module")
def pair(path: Path) -> Iterator[tuple[Plugins, list[ThreadWorker]]]:
    plugins = load_plugins()
    always_entropy(plugins, "transparent")
    with thread_workers(path.parent, 2, "mesh", plugins=plugins, settings=SETTINGS) as workers:
        yield plugins, workers


@pytest.fixture
def chain(path: Path, pair: tuple[Plugins, list[ThreadWorker]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Chain]:
    plugins, workers = pair
    with (
        faulty_link(workers[0].address) as first,
        faulty_link(workers[1].address) as last,
        faulty_link(workers[1].address) as between,
    ):
        introduce = hops._introduction
        monkeypatch.setattr(hops, "_introduction", lambda remote: introduce(remote) | {"address": between.address})
        yield Chain(path, plugins, workers, first, last, between)


@pytest.fixture(scope="module")
def undisturbed(path: Path, pair: tuple[Plugins, list[ThreadWorker]]) -> Tensor:
    plugins, workers = pair
    picture, run = drawn(path, [worker.address for worker in workers], plugins)
    sizes = [step.hops[1].in_coded for step in run.stats.steps]
    assert max(sizes[1:]) < 0.8 * sizes[0], "steps are predicted from the ones before"
    return picture


def cut_first(chain: Chain) -> None:
    chain.first.cut()


def cut_first_as_a_state_crosses(chain: Chain) -> None:
    chain.first.truncate(5000)


def cut_last(chain: Chain) -> None:
    chain.last.cut()


def cut_between(chain: Chain) -> None:
    chain.between.cut()


def cut_between_as_a_state_crosses(chain: Chain) -> None:
    chain.between.truncate(5000)


def cut_all(chain: Chain) -> None:
    for link in (chain.first, chain.between, chain.last):
        link.cut()


def silence_between_for_a_while(chain: Chain) -> None:
    chain.between.go_dead()
    chain.between.heal()


@pytest.mark.parametrize(
    "fault",
    [
        cut_first,
        cut_first_as_a_state_crosses,
        cut_last,
        cut_between,
        cut_between_as_a_state_crosses,
        cut_all,
        silence_between_for_a_while,
    ],
    ids=lambda fault: fault.__name__,
)
def test_a_link_that_breaks_changes_no_bit(chain: Chain, undisturbed: Tensor, fault: Callable[[Chain], None]) -> None:
    began = monotonic()
    picture, run = chain.picture(lambda _: fault(chain))
    assert torch.equal(picture, undisturbed)
    steps = run.stats.steps
    assert sum(step.resent for step in steps) == steps[DISTURBED].resent >= 1 and not any(s.restarted for s in steps)
    assert monotonic() - began < 20, "a loss is noticed long before the deadline of 60 s"


def test_a_dead_way_to_the_neighbour_is_gone_around(chain: Chain) -> None:
    expected, _ = chain.picture()
    picture, run = chain.picture(lambda _: chain.between.go_dead())
    assert len(run.session._legs) == 2 if run.session is not None and run.session._legs else True
    steps = run.stats.steps
    assert [step.restarted for step in steps] == [i == DISTURBED for i in range(STEPS)], (
        "other codec streams from there"
    )
    assert "1 steps started at a key frame" in run.stats.table()
    assert float((picture - expected).square().mean()) < 1e-4 * float(expected.square().mean())


def test_a_step_that_was_cancelled_leaves_no_trace(
    chain: Chain, undisturbed: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(run: SplitRunner) -> None:
        land = Flight.land

        def interrupted(flight: Flight, *arguments: object) -> object:
            # Both workers have coded the step by then.
            wait_until(flight.leg.hops[-1].remote.receive, what="the result")
            raise KeyboardInterrupt

        monkeypatch.setattr(Flight, "land", interrupted)
        other = tiny.inputs(guidance=False, height=16, width=16, seed=9)["hidden_states"]
        start = tiny.inputs(guidance=False, height=16, width=16)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run({**start, "hidden_states": other, "timestep": torch.tensor([0.5])})
        monkeypatch.setattr(Flight, "land", land)

    picture, run = chain.picture(interrupt)
    assert torch.equal(picture, undisturbed)
    assert not any(step.resent or step.restarted for step in run.stats.steps)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_was_started_anew_is_told_of_in_the_stats(chain: Chain, undisturbed: Tensor, victim: int) -> None:
    picture, run = chain.picture(lambda _: chain.workers[victim].restart())
    steps = run.stats.steps
    assert [step.restarted for step in steps] == [i == DISTURBED for i in range(STEPS)]
    assert "1 steps started at a key frame: within the quality, and not as undisturbed" in run.stats.table()
    assert 0 < float((picture - undisturbed).square().mean()) < 1e-4 * float(undisturbed.square().mean())


def test_a_codec_that_cannot_go_back_starts_anew_and_it_is_told(
    chain: Chain, undisturbed: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EntropyCodec, "memory", lambda codec, settings: "reset")
    picture, run = chain.picture(lambda _: chain.between.cut())
    steps = run.stats.steps
    assert [step.restarted for step in steps] == [i == DISTURBED for i in range(STEPS)]
    assert sum(step.resent for step in steps) == 1
    assert 0 < float((picture - undisturbed).square().mean()) < 1e-4 * float(undisturbed.square().mean())
