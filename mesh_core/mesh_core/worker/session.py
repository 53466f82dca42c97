"""A session as its worker holds it. Knows no sockets."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic

from mesh_core.crossing.streams import Streams
from mesh_core.errors import Cancelled
from mesh_core.loras.lora import Applied
from mesh_core.model.library import Checkpoint
from mesh_core.worker.bounds import StepBounds
from mesh_core.worker.onward import Onward
from mesh_core.worker.stages import Loaded


@dataclass
class StepMemory:
    """All that one step of a session leaves behind for the next; nothing else of a step survives it.

    Belongs to the thread that computes.

    Attributes:
        inputs, outputs: codec streams of the tensors that arrive and that are handed on.
        attempt: of the host to run its step; it sends a step again with the next number.
    """

    inputs: Streams
    outputs: Streams
    attempt: int = 0

    def begin(self, attempt: int) -> None:
        """A step of this attempt is computed now.

        Raises:
            Cancelled: the host has given it up, and this worker computed something newer since.
        """
        if attempt < self.attempt:
            raise Cancelled("A step that was given up came late.")
        self.attempt = attempt

    def alike(self, other: StepMemory) -> bool:
        """Whether it can serve in the place of ``other``: their streams code in the same way."""
        return self.inputs.alike(other.inputs) and self.outputs.alike(other.outputs)


@dataclass
class WorkerSession:
    """One host's use of one stage.

    Attributes:
        owner: public key of the host that opened it; nobody else may use it, but for ``neighbours``.
        route: where results go; follows the owner when it reconnects.
        checkpoint: that the stage is a span of.
        memory: what lasts from step to step.
        bounds: of its steps.
        next: the way to the worker that continues; None at the end of a chain.
        loras: those of its stage, in order; their files stay while they are here.
        neighbours: public keys of workers that may hand over states.
        last_seen: time (monotonic) when its host was last heard of.
    """

    id: bytes
    owner: str
    route: bytes
    loaded: Loaded
    checkpoint: Checkpoint
    memory: StepMemory
    bounds: StepBounds
    next: Onward | None = None
    loras: tuple[Applied, ...] = ()
    neighbours: set[str] = field(default_factory=set)
    last_seen: float = field(default_factory=monotonic)

    def close(self) -> None:
        """Close the way to the next worker."""
        if self.next is not None:
            self.next.close()
