"""What a step cost: bytes and milliseconds per worker, and the table that people read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from statistics import median
from typing import Any

from mesh_core.system.tables import aligned
from mesh_core.visible import visible

_MOST_BYTES, _MOST_MS = 1 << 53, 1e9
"""No step costs as much: whole numbers that a float holds exactly; eleven days."""


@dataclass
class HopStats:
    """One worker's part of one step, as it reports itself. Milliseconds and bytes.

    Attributes:
        in_raw, in_coded: the state that came in, as tensors and as what crossed; ``out_*``: what went out.
        queue_ms: waiting for other sessions and for its own thread.
        busy_ms: from the arrival of the message to the sending of the answer.
    """

    worker: str = ""
    span: str = ""
    in_raw: int = 0
    in_coded: int = 0
    out_raw: int = 0
    out_coded: int = 0
    queue_ms: float = 0.0
    decode_ms: float = 0.0
    compute_ms: float = 0.0
    encode_ms: float = 0.0
    busy_ms: float = 0.0

    @classmethod
    def from_trace(cls, report: Mapping[str, Any]) -> HopStats:
        """From a worker's report; what it leaves out, has of another type, or cannot have cost counts as nothing."""
        known = _kinds()
        said: dict[str, Any] = {k: v for k, v in report.items() if k in known and _can_be(v, known[k])}
        return cls(**said)


@cache
def _kinds() -> dict[str, str]:
    """The type of each field of `HopStats`."""
    return {f.name: str(f.type) for f in fields(HopStats)}


def _can_be(value: object, kind: str) -> bool:
    """Whether a worker may say this of a step: what it sends is summed, divided and shown."""
    if kind == "str":
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int if kind == "int" else (int, float)):
        return False
    return 0 <= value < (_MOST_BYTES if kind == "int" else _MOST_MS)


@dataclass
class StepStats:
    """One step. ``wire_ms`` covers all links of the chain: workers' clocks are not compared.

    Attributes:
        local_ms: the host's own span.
        encode_ms, decode_ms: at the host.
        codec, reason: how the hidden state crosses, and why.
        resent: how often the step had to be sent again.
        restarted: whether codecs had lost what the step would have been predicted from, so that it started at a key
            frame: its result is within the quality, and not the one that it would have been.
    """

    step: int
    total_ms: float = 0.0
    local_ms: float = 0.0
    encode_ms: float = 0.0
    decode_ms: float = 0.0
    wire_ms: float = 0.0
    hops: list[HopStats] = field(default_factory=list)
    codec: str = ""
    reason: str = ""
    resent: int = 0
    restarted: bool = False

    @property
    def overhead_ms(self) -> float:
        """All but compute, codec and wire."""
        codec = self.encode_ms + self.decode_ms + sum(h.encode_ms + h.decode_ms for h in self.hops)
        return self.total_ms - codec - self.wire_ms - sum(h.compute_ms for h in self.hops)


@dataclass
class RunStats:
    """All steps since the session opened or `clear` was called.

    ``loras``: for each LoRA and worker, what was decided and why, and the bytes that were sent for it.
    """

    steps: list[StepStats] = field(default_factory=list)
    constants_bytes: int = 0
    reconnects: int = 0
    loras: list[dict[str, Any]] = field(default_factory=list)

    def clear(self) -> None:
        """Count anew from here on; what was decided for LoRAs stays."""
        self.steps.clear()
        self.constants_bytes = self.reconnects = 0

    def table(self) -> str:
        """Medians per step, one row per worker, and the totals; plain text."""
        if not self.steps:
            return "no steps crossed a cut"
        rows = [_HEAD]
        for i in range(max(len(s.hops) for s in self.steps)):
            hops = [s.hops[i] for s in self.steps if i < len(s.hops)]
            rows.append(_row(hops))
        return "\n".join([*aligned(rows, left=2), "", *map(visible, self._totals())])

    def _totals(self) -> list[str]:
        def mid(value: Callable[[StepStats], float]) -> float:
            return median(value(s) for s in self.steps)

        parts = {
            "host blocks": mid(lambda s: s.local_ms),
            "host encode": mid(lambda s: s.encode_ms),
            "wire": mid(lambda s: s.wire_ms),
            "host decode": mid(lambda s: s.decode_ms),
            "overhead": mid(lambda s: s.overhead_ms),
        }
        inwards = sum(h.in_coded for s in self.steps for h in s.hops)
        crossed = inwards + sum(s.hops[-1].out_coded for s in self.steps if s.hops)
        lines = [
            f"{len(self.steps)} steps, median {mid(lambda s: s.total_ms + s.local_ms):.1f} ms: "
            + ", ".join(f"{name} {ms:.1f}" for name, ms in parts.items()),
            f"{crossed / 1e6:.2f} MB crossed, and {self.constants_bytes / 1e6:.2f} MB of constants once; "
            f"{self.steps[-1].reason or self.steps[-1].codec}",
        ]
        resent, restarted = sum(s.resent for s in self.steps), sum(s.restarted for s in self.steps)
        if resent or self.reconnects:
            lines.append(f"{self.reconnects} reconnects, {resent} steps sent again")
        if restarted:
            lines.append(f"{restarted} steps started at a key frame: within the quality, and not as undisturbed")
        lines += [f"LoRA {p['lora']} on {p['worker']} {p['span']}: {p['action']}, {p['reason']}" for p in self.loras]
        return lines


_HEAD = ["worker", "blocks", "in KB", "raw KB", "out KB", "raw KB", "queue ms", "decode ms", "compute ms", "encode ms"]


def _row(hops: Sequence[HopStats]) -> list[str]:
    def kb(name: str) -> str:
        return f"{median(getattr(h, name) for h in hops) / 1e3:.1f}"

    def ms(name: str) -> str:
        return f"{median(getattr(h, name) for h in hops):.1f}"

    sizes = [kb("in_coded"), kb("in_raw"), kb("out_coded"), kb("out_raw")]
    return [hops[0].worker, hops[0].span, *sizes, ms("queue_ms"), ms("decode_ms"), ms("compute_ms"), ms("encode_ms")]
