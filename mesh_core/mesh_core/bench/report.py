"""Results as a table for people, and as files that can be compared: JSON, and Markdown with the machine's label."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from mesh_core import __version__
from mesh_core.bench.step import LINKS, Measured

TARGET_OVERHEAD_MS = 2.0
TARGET_PLAIN_MB_S = 1000.0
TARGET_ENCRYPTED_MB_S = 450.0
LARGE = 32 << 20
"""Bytes from which a state counts for the throughput targets."""

_COLUMNS: tuple[tuple[str, Callable[[Measured], str]], ...] = (
    ("state MB", lambda m: f"{m.state_bytes / 1e6:.1f}"),
    ("link", lambda m: "CURVE" if m.encrypted else "plain"),
    ("step ms", lambda m: f"{m.total_ms:.1f}"),
    ("compute ms", lambda m: f"{m.compute_ms:.1f}"),
    ("codec ms", lambda m: f"{m.codec_ms:.1f}"),
    ("wire ms", lambda m: f"{m.wire_ms:.1f}"),
    ("overhead ms", lambda m: f"{m.overhead_ms:.2f}"),
    ("90 % under", lambda m: f"{m.overhead_high_ms:.2f}"),
    ("bare pyzmq ms", lambda m: f"{m.bare_ms:.1f}"),
    ("beyond bare ms", lambda m: f"{m.beyond_bare_ms:.2f}"),
    ("mesh MB/s", lambda m: f"{m.mesh_mb_s:.0f}"),
    ("pyzmq MB/s", lambda m: f"{m.bare_mb_s:.0f}"),
)

LEGEND = f"""\
Medians. Two worker processes on loopback; the state crosses {LINKS} links per step, uncoded (raw), and comes back.
overhead: a step less compute, codec and wire. bare pyzmq: the same bytes through three processes with DEALER and
ROUTER sockets and nothing else, alternating with the steps. beyond bare: a step less compute and codec, less that;
it holds all that the mesh adds, on the wire too. codec: raw copies memory, to align what arrived for computing."""


def table(results: Sequence[Measured]) -> str:
    """Plain text, one row per case."""
    rows = [[name for name, _ in _COLUMNS], *([show(m) for _, show in _COLUMNS] for m in results)]
    widths = [max(len(row[c]) for row in rows) for c in range(len(_COLUMNS))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, "", LEGEND])


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


def environment(label: str) -> dict[str, Any]:
    """The machine and the versions that results belong to."""
    found = {name: version(name) for name in ("torch", "pyzmq")}
    return {
        "hardware": label or f"{psutil.cpu_count()}-core {platform.machine()}",
        "cores": psutil.cpu_count(),
        "processes that wanted a core, last minute": round(psutil.getloadavg()[0], 1),
        "system": platform.system(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "comfyui-mesh": __version__,
        **found,
    }


def save(folder: Path, name: str, label: str, data: Mapping[str, Any], text: str) -> list[Path]:
    """``NAME-LABEL.json`` and ``.md`` in ``folder``."""
    facts = environment(label)
    stem = f"{name}-{re.sub(r'[^a-z0-9]+', '-', facts['hardware'].lower()).strip('-')}"
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_text = folder / f"{stem}.json", folder / f"{stem}.md"
    as_json.write_text(json.dumps({**facts, **data}, indent=2) + "\n", encoding="utf-8", newline="\n")
    listed = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    as_text.write_text(f"# {name}\n\n{listed}\n\n```\n{text}\n```\n", encoding="utf-8", newline="\n")
    return [as_json, as_text]


def plain(results: Sequence[Measured]) -> dict[str, Any]:
    return {"results": [asdict(m) for m in results], "targets": verdicts(results)}
