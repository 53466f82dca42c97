"""The golden messages of tests/data/wire, loaded from the script that writes them."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from mesh_core import wire

FOLDER = Path(__file__).parents[1] / "data" / "wire"
_SCRIPT: dict[str, Any] = runpy.run_path(str(FOLDER / "write.py"))
EXAMPLES: dict[str, tuple[wire.Message, list[bytes]]] = {
    type(message).__name__.lower(): (message, buffers) for message, buffers in _SCRIPT["EXAMPLES"]
}


def golden(kind: str) -> bytes:
    """Frame 0 of the example, as it was written once."""
    return (FOLDER / f"{kind}.bin").read_bytes()
