"""What a machine does while nobody sees a step: data for whoever shows it, and its words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from mesh_core.visible import visible
from mesh_core.wire import phases

THIS_MACHINE = "this machine"
"""How the host names itself."""


class Phase(str, Enum):
    """What is going on."""

    CHECKING = phases.CHECKING
    LOADING = phases.LOADING
    SENDING_LORA = "sending lora"
    WAITING = "waiting"
    OTHER = "other"
    """Whatever a worker of another version says that it does."""


WORDS: Mapping[Phase, str] = {
    Phase.CHECKING: "checking weights",
    Phase.LOADING: "loading",
    Phase.SENDING_LORA: "sending LoRA",
    Phase.WAITING: "waiting for it to come back",
}
"""For people; what is `Phase.OTHER` is shown in the worker's own words."""


@dataclass(frozen=True)
class Activity:
    """Something that takes a while, and how far it is.

    Attributes:
        machine: a worker's name, or `THIS_MACHINE`.
        done, total: in ``unit``; total is 0 where nobody knows it.
        subject: the LoRA that is sent; why a worker is waited for; what a worker calls a phase that is not known here.
    """

    machine: str
    phase: Phase
    done: int = 0
    total: int = 0
    subject: str = ""

    @property
    def unit(self) -> Literal["bytes", "seconds"]:
        """Of ``done`` and ``total``: a lost worker is waited for by the clock, everything else moves bytes."""
        return "seconds" if self.phase is Phase.WAITING else "bytes"

    @property
    def words(self) -> str:
        """Who does what, as one short line."""
        if self.phase is Phase.WAITING:
            return visible(f"{self.subject}: {WORDS[self.phase]}")
        what = self.subject if self.phase is Phase.OTHER else f"{WORDS[self.phase]} {self.subject}".rstrip()
        return visible(f"{self.machine}: {what}")

    @classmethod
    def of_worker(cls, machine: str, phase: str, done: int, total: int) -> Activity:
        """From what a worker says over the wire."""
        known = next((p for p in (Phase.CHECKING, Phase.LOADING) if p.value == phase), None)
        return cls(machine, known or Phase.OTHER, done, total, "" if known else phase[:100])


ProgressReport = Callable[[Activity], None]
"""Told now and then; what it raises ends what is reported."""
