"""The golden messages of tests/data/wire, loaded from the script that writes them."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mesh_core import wire

FOLDER = Path(__file__).parents[1] / "data" / "wire"
_SCRIPT: dict[str, Any] = runpy.run_path(str(FOLDER / "write.py"))
EXAMPLES: dict[str, tuple[wire.Message, list[bytes]]] = {
    wire.type_name(type(message)): (message, buffers) for message, buffers in _SCRIPT["EXAMPLES"]
}

as_msgpack: Callable[[wire.Message, list[bytes]], bytes] = _SCRIPT["as_msgpack"]
"""Frame 0 of a message as msgpack writes it, which the product does not use."""


def golden(kind: str) -> bytes:
    """Frame 0 of the example, as it was written once."""
    return (FOLDER / f"{kind}.bin").read_bytes()
