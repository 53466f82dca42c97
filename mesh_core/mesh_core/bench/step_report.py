"""The table of ``mesh bench step``, and what its numbers say of the targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from mesh_core.bench.step import LINKS, Measured
from mesh_core.system.tables import aligned

M = TypeVar("M", bound=Measured)
Columns = Sequence[tuple[str, Callable[[M], str]]]
"""Head and cell of each."""

TARGET_OVERHEAD_MS = 2.0
TARGET_PLAIN_MB_S = 1000.0
TARGET_ENCRYPTED_MB_S = 450.0
LARGE = 32 << 20
"""Bytes from which a state counts for the throughput targets."""

COLUMNS: Columns[Measured] = (
    ("state MB", lambda m: f"{m.state_bytes / 1e6:.1f}"),
    ("link", lambda m: "CURVE" if m.encrypted else "plain"),
    ("step ms", lambda m: f"{m.total_ms:.1f}"),
    ("compute ms", lambda m: f"{m.compute_ms:.1f}"),
    ("codec ms", lambda m: f"{m.codec_ms:.1f}"),
    ("wire ms", lambda m: f"{m.wire_ms:.1f}"),
    ("overhead ms", lambda m: f"{m.overhead_ms:.2f}"),
    ("90 % under", lambda m: f"{m.overhead_high_ms:.2f}"),
    ("mesh MB/s", lambda m: f"{m.mesh_mb_s:.0f}"),
)

LEGEND = f"""\
Medians. Two worker processes on loopback; the state crosses {LINKS} links per step, uncoded (raw), and comes back.
overhead: a step less compute, codec and wire. codec: raw copies memory, to align what arrived for computing."""


def table(results: Sequence[M], columns: Columns[M] = COLUMNS, legend: str = LEGEND) -> str:
    """Plain text, one row per case."""
    cells = [[name for name, _ in columns], *([show(m) for _, show in columns] for m in results)]
    return "\n".join([*aligned(cells), "", legend])


def verdicts(results: Sequence[Measured]) -> list[str]:
    """Each target that these cases can tell of, and whether it was met."""
    lines = []
    worst = max(results, key=lambda m: m.overhead_ms)
    lines.append(_verdict("overhead per step", worst.overhead_ms, "<=", TARGET_OVERHEAD_MS, "ms"))
    for encrypted, target in ((False, TARGET_PLAIN_MB_S), (True, TARGET_ENCRYPTED_MB_S)):
        speeds = [m.mesh_mb_s for m in results if m.encrypted is encrypted and m.state_bytes >= LARGE]
        if speeds:
            name = f"{'encrypted' if encrypted else 'plain'} throughput of large states"
            lines.append(_verdict(name, min(speeds), ">=", target, "MB/s"))
    return lines


def _verdict(name: str, found: float, relation: str, target: float, unit: str) -> str:
    met = found <= target if relation == "<=" else found >= target
    return f"{'met   ' if met else 'MISSED'}  {name}: {found:.1f} {unit}, target {relation} {target:g} {unit}"


def plain(results: Sequence[Measured]) -> dict[str, Any]:
    """Results and targets as JSON takes them."""
    return {"results": [asdict(m) for m in results], "targets": verdicts(results)}
