"""``mesh`` in a process that may take so much of the GPU and no more, and that notes what it takes.

    python -m benchmarks.quantised.limited BYTES FILE serve ...

What lies beyond the limit does not exist for torch's allocator, as on a smaller card.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from threading import Thread

import torch

CONTEXT = 700_000_000
"""Bytes of a budget that are left to the context of CUDA and the kernels that are loaded."""


def limit(budget: int) -> None:
    """Let torch's allocator have what a card of ``budget`` bytes would leave to it."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(budget - CONTEXT, 1 << 20) / total))


def reserved() -> dict[str, int]:
    """Bytes that torch's allocator holds and has held at most."""
    if not torch.cuda.is_initialized():
        return {"now": 0, "peak": 0}
    return {"now": torch.cuda.memory_reserved(), "peak": torch.cuda.max_memory_reserved()}


def _note(file: Path) -> None:
    while True:
        part = file.with_name(f"{file.name}.part")
        part.write_text(json.dumps(reserved()))
        part.replace(file)
        time.sleep(0.25)


def main() -> None:
    budget, file = int(sys.argv[1]), Path(sys.argv[2])
    limit(budget)
    Thread(target=_note, args=(file,), daemon=True).start()
    from mesh_core.cli import main as mesh

    sys.argv[1:] = sys.argv[3:]
    mesh()


if __name__ == "__main__":
    main()
