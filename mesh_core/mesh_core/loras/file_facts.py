"""What people want to know of a LoRA's file: what it is, and what it does to a checkpoint. Plain values."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from mesh_core.loras.bounds import read_lora_header
from mesh_core.loras.facts import facts_for_people
from mesh_core.loras.read import read_lora
from mesh_core.model.checkpoint import read_header
from mesh_core.model.library import recognise
from mesh_core.plugins.registry import Plugins


def facts(file: Path) -> dict[str, Any]:
    """Tensors, bytes, and what the file says of itself; reads its header only."""
    header = read_lora_header(file)
    size = sum(t.nbytes for t in header.tensors.values())
    found = {"file": str(file), "tensors": len(header.tensors), "bytes": size}
    return found | {key: value for key, value in facts_for_people(header.metadata).items() if value}


def effect(file: Path, model: Path, plugins: Plugins) -> dict[str, Any]:
    """What it does to the checkpoint ``model``: which weights it changes, and which of its keys match none.

    Raises:
        LoraUnmatched: it changes nothing of that model.
    """
    checkpoint = recognise(read_header(model), plugins)
    found = read_lora(file, checkpoint)
    return {
        "family": checkpoint.spec.family,
        "id": found.id,
        "algorithms": dict(Counter(p.algorithm for p in found.patches)),
        "parameters": len({name for p in found.patches for name in p.parameters}),
        "unmatched": list(found.unmatched),
    }
