"""Results of any measurement as files that can be compared: JSON, and Markdown with the machine's
label. Knows no measurement."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from mesh_core import __version__


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
