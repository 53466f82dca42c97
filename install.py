"""Run by ComfyUI-Manager after it cloned this folder into custom_nodes, and by hand with ComfyUI's Python.

Installs the packages of this folder for the Python that runs it, so that they are found as plugins; what they need from
elsewhere is in requirements.txt. They stay linked to this folder: a ``git pull`` is enough to update them.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = ("codec", ".", "adapters/flux2", "adapters/klein", "adapters/ltx")


def installer() -> list[str]:
    """pip, or uv where an environment has no pip."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install"]
    uv = shutil.which("uv")
    if uv is None:
        raise SystemExit("Neither pip nor uv is there: install one for ComfyUI's Python, then run this again.")
    return [uv, "pip", "install", "--python", sys.executable]


def main() -> int:
    editable = [argument for part in PARTS for argument in ("-e", str(HERE / part))]
    return subprocess.run([*installer(), "--no-deps", *editable]).returncode


if __name__ == "__main__":
    sys.exit(main())
