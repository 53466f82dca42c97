"""Generations over a chain of two workers, with one random fault in each: they end, and with the undisturbed result.

A fault meets a worker (killed, stopped for a while) or a link (cut, cut within a message, silent, stranded, slow,
refusing), at a random moment, once or twice, and passes. `python -m tests.faults.long trials` runs hundreds of them.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psutil
import torch
from torch import Tensor

from mesh_codec.base import Quality
from mesh_core.errors import MeshError
from mesh_core.host.runner import SplitRunner
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Settings
from tests.faults.processes import FastWorker, workers
from tests.support.choosing import always_entropy
from tests.support.faulty_link import FaultyLink, faulty_link
from tests.support.splitting import split

STEPS = 6
"""Of a generation."""

FAULTS = ("kill", "pause", "cut", "truncate", "silence", "strand", "slow", "refuse")

_SLOW = 200e3
"""Bytes per second of a slow link."""

_LONGEST = 1.5
"""Seconds that a fault lasts; longer than a worker may be silent in these trials."""


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        kind: of `FAULTS`.
        place: of the two workers, or of the links to them.
        after: seconds from the start of the generation.
        lasts: seconds.
        nbytes: that still cross before a link is cut within a message.
    """

    kind: str
    place: int
    after: float
    lasts: float
    nbytes: int

    @classmethod
    def random(cls, dice: random.Random, within: float, kinds: Sequence[str] = FAULTS) -> Fault:
        """A fault at a moment of a generation that takes ``within`` seconds."""
        return cls(
            kind=dice.choice(kinds),
            place=dice.randrange(2),
            after=dice.uniform(0, within),
            lasts=dice.choice((0.0, dice.uniform(0, _LONGEST))),
            nbytes=int(2 ** dice.uniform(0, 17)),
        )


@dataclass
class Outcome:
    """How one trial ended.

    Attributes:
        error: that ended the generation; "" for none.
        exact: whether its result, and that of an undisturbed generation after it, are those without faults.
        distance: the largest difference between results, over the largest value.
        started_anew: steps that began with key frames because a worker process had died.
    """

    seed: int
    faults: list[Fault]
    error: str = ""
    exact: bool = False
    distance: float = 0.0
    seconds: float = 0.0
    resent: int = 0
    started_anew: int = 0


@dataclass
class Summary:
    """Of many trials."""

    trials: int = 0
    lost: list[Outcome] = field(default_factory=list)
    differing: list[Outcome] = field(default_factory=list)
    within_quality: int = 0
    resent: int = 0
    slowest: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        self.trials += 1
        self.kinds.update(fault.kind for fault in outcome.faults)
        self.resent += outcome.resent
        self.slowest = max(self.slowest, outcome.seconds)
        if outcome.error:
            self.lost.append(outcome)
        elif not outcome.exact and outcome.started_anew:
            self.within_quality += 1
        elif not outcome.exact:
            self.differing.append(outcome)


class Trials:
    """A chain of two workers with a link to each, and what its generations give without faults.

    Args:
        quality: ``lossless``, or one whose codec predicts from step to step.
    """

    def __init__(
        self, pair: Sequence[FastWorker], links: Sequence[FaultyLink], runner: SplitRunner, inputs: dict[str, Any]
    ) -> None:
        self._pair, self._links, self._runner, self._inputs = pair, links, runner, inputs
        self.expected = self._generate()
        began = monotonic()
        assert torch.equal(self._generate(), self.expected), "an undisturbed generation gives the same every time"
        self.usual_seconds = monotonic() - began

    def run(self, seed: int) -> Outcome:
        """One generation with the faults of ``seed``, and an undisturbed one after it."""
        dice = random.Random(seed)
        faults = [Fault.random(dice, self.usual_seconds) for _ in range(dice.choice((1, 1, 2)))]
        outcome = Outcome(seed, faults)
        known = len(self._runner.stats.steps)
        threads = [threading.Thread(target=self._inflict, args=(fault,), daemon=True) for fault in faults]
        began = monotonic()
        for thread in threads:
            thread.start()
        try:
            result = self._generate()
        except MeshError as error:
            outcome.error = f"{type(error).__name__}: {error}"
        for thread in threads:
            thread.join(30)
        for link in self._links:
            link.heal()
        for worker in self._pair:
            if not worker.process.is_alive():
                outcome.error += f" a worker ended by itself: {worker.process.exitcode}"
                worker.begin()
        outcome.seconds = monotonic() - began
        outcome.resent = sum(step.resent for step in self._runner.stats.steps[known:])
        outcome.started_anew = sum(step.restarted for step in self._runner.stats.steps[known:])
        if not outcome.error:
            outcome.distance = float((result - self.expected).abs().max() / self.expected.abs().max())
            outcome.exact = torch.equal(result, self.expected) and torch.equal(self._generate(), self.expected)
        return outcome

    def _generate(self) -> Tensor:
        """As a sampler does: each step starts from what the steps before it gave."""
        latents = self._inputs["hidden_states"]
        for step in range(STEPS):
            moment = torch.full_like(self._inputs["timestep"], 1 - step / STEPS)
            velocity = self._runner({**self._inputs, "hidden_states": latents, "timestep": moment})
            latents = latents - velocity / STEPS
        return latents

    def _inflict(self, fault: Fault) -> None:
        sleep(fault.after)
        worker, link = self._pair[fault.place], self._links[fault.place]
        begin: dict[str, Callable[[], None]] = {
            "kill": worker.kill,
            "pause": worker.pause,
            "cut": link.cut,
            "truncate": lambda: link.truncate(fault.nbytes),
            "silence": link.stop,
            "strand": link.strand,
            "slow": partial(setattr, link, "rate", _SLOW),
            "refuse": link.refuse,
        }
        # A link that was not cut yet stays to be cut until the generation is over.
        end = {"kill": worker.begin, "pause": worker.resume, "truncate": lambda: None}
        with suppress(psutil.NoSuchProcess):  # the other fault has killed it
            begin[fault.kind]()
        sleep(fault.lasts)
        with suppress(psutil.NoSuchProcess):
            end.get(fault.kind, link.heal)()


@contextmanager
def trials(
    model: Path, inputs: dict[str, Any], plugins: Plugins, settings: Settings, quality: Quality = "lossless"
) -> Iterator[Trials]:
    """Trials on the model at ``model``, its first block here."""
    with ExitStack() as stack:
        pair = stack.enter_context(workers(model.parent, 2, settings))
        links = [stack.enter_context(faulty_link(worker.address)) for worker in pair]
        addresses = [link.address for link in links]
        if quality != "lossless":
            always_entropy(plugins, quality)
        runner = stack.enter_context(split(model, ":1", addresses, plugins, settings=settings, quality=quality))
        yield Trials(pair, links, runner, inputs)
