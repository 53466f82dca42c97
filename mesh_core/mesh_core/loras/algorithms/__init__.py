"""What each LoRA algorithm does to a weight, in float32. Knows no files, names or models.

Where a program defines what a file means, its order of operations is kept, so results agree to the last bit or two:
ComfyUI's for everything but ``magnitude``, which is PEFT's. ``shape`` is that of the weight, [out, in, ...].

A new algorithm is an `Algorithm` in a module of this package, and its name in `ALGORITHMS`; the endings of its tensors'
names in files are in `mesh_core.loras.endings`.
"""

from __future__ import annotations

from collections.abc import Mapping

from mesh_core.loras.algorithms.algorithm import Algorithm
from mesh_core.loras.algorithms.glora import GLORA
from mesh_core.loras.algorithms.products import LOHA, LOKR, LORA
from mesh_core.loras.algorithms.rotations import BOFT, OFT
from mesh_core.loras.algorithms.whole import DIFF, SET

__all__ = ["ALGORITHMS", "Algorithm"]

ALGORITHMS: Mapping[str, Algorithm] = {
    "lora": LORA,
    "loha": LOHA,
    "lokr": LOKR,
    "glora": GLORA,
    "oft": OFT,
    "boft": BOFT,
    "diff": DIFF,
    "set": SET,
}
"""Every algorithm by name."""
