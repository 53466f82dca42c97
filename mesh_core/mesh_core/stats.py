"""What a step cost: bytes and milliseconds per worker. The one place where bytes are counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median


@dataclass
class HopStats:
    """One worker's part of one step. Times in milliseconds, sizes in bytes.

    ``sent``/``received`` are seen from whoever handed the state to the worker; ``raw`` is the size of the tensors,
    ``coded`` the size of the payload that crossed.
    """

    worker: str
    span: str
    sent_raw: int = 0
    sent_coded: int = 0
    received_raw: int = 0
    received_coded: int = 0
    encode_ms: float = 0.0
    wire_ms: float = 0.0
    queue_ms: float = 0.0
    decode_ms: float = 0.0
    compute_ms: float = 0.0
    overhead_ms: float = 0.0


@dataclass
class StepStats:
    """One step over all workers."""

    step: int
    total_ms: float = 0.0
    local_ms: float = 0.0
    hops: list[HopStats] = field(default_factory=list)
    codec: str = ""
    reason: str = ""
    resent: int = 0


@dataclass
class RunStats:
    """All steps since the session opened or `clear` was called."""

    steps: list[StepStats] = field(default_factory=list)
    constants_bytes: int = 0
    reconnects: int = 0

    def clear(self) -> None:
        self.steps.clear()
        self.constants_bytes = self.reconnects = 0
