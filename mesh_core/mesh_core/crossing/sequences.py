"""Names for the codec streams of a session, so that passes which have nothing to do with each other share none.

A pass is known by the constants that it runs with: conditional and unconditional passes, and images of other sizes
or prompts, differ in them. A generation begins anew where the moment at which the last one began comes again, so the
same request gives the same result whatever ran before it. Knows hashes only: no tensors, no codecs, no wire.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b

MOST_SEQUENCES = 8
"""That an end keeps streams for, per direction of a session; of more, the one that was used longest ago is dropped."""

_MARK = "#"


@dataclass(frozen=True)
class Turn:
    """Where a step stands in its sequence, the same at all ends.

    Attributes:
        step: its number.
        after: number of the step of the same sequence whose tensors it is predicted from: the last one whose result the
            host has. 0 where it starts at key frames.
    """

    sequence: str
    step: int
    after: int = 0


@dataclass
class _Run:
    take: int
    first: str
    last: str
    reached: int = 0
    broken: bool = False


class Sequences:
    """Used from one thread; the host's."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._takes = 0

    def name(self, given: str, constants: Mapping[str, str], moment: str) -> str:
        """The sequence that a step belongs to.

        Args:
            given: the host's own name for the pass.
            constants: name -> hash of everything that stays the same for a generation.
            moment: hash of what tells one step of a generation from the next, such as the time embedding.
        """
        listed = "".join(f"{name} {constants[name]}\n" for name in sorted(constants))
        run_name = f"{given[:64]}:{blake2b(listed.encode(), digest_size=8).hexdigest()}"
        run = self._runs.get(run_name)
        # A sampler may look at a moment twice in a row, the first one included.
        if run is None or (moment == run.first and moment != run.last):
            self._takes += 1
            run = self._runs[run_name] = _Run(self._takes, moment, moment)
        run.last = moment
        self._runs.move_to_end(run_name)
        while len(self._runs) > MOST_SEQUENCES:
            self._runs.popitem(last=False)
        return f"{run_name}{_MARK}{run.take}"

    def turn(self, sequence: str, step: int) -> Turn:
        """That of step number ``step``, which builds on the last one that was `heard`."""
        run = self._run(sequence)
        return Turn(sequence, step, run.reached if run is not None else 0)

    def heard(self, turn: Turn) -> None:
        """The result of a step has come: all ends have coded it."""
        run = self._run(turn.sequence)
        if run is not None:
            run.reached, run.broken = turn.step, False

    def restart(self, sequence: str = "", *, broken: bool) -> None:
        """Have ``sequence``, or all, start at key frames. ``broken``: what they were predicted from was lost."""
        for run in list(self._runs.values()) if not sequence else filter(None, [self._run(sequence)]):
            run.broken = run.broken or (broken and run.reached > 0)
            run.reached = 0

    def forget(self) -> None:
        """All that comes is of new generations."""
        self._runs.clear()

    def broken(self, sequence: str) -> bool:
        """Whether the next step of ``sequence`` would have been predicted, had nothing been lost."""
        run = self._run(sequence)
        return run is not None and run.broken

    def _run(self, sequence: str) -> _Run | None:
        """That ``sequence`` is the newest generation of."""
        name, _, take = sequence.rpartition(_MARK)
        run = self._runs.get(name)
        return run if run is not None and str(run.take) == take else None


def pass_of(sequence: str) -> str:
    """A sequence's name without its generation: of each pass only the newest generation is worth keeping."""
    return sequence.rpartition(_MARK)[0] or sequence
