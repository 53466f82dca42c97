"""LoRAs are sent to the workers named in MESH_LORA_FRIENDS (separated by commas), however large, and to no others.

What a worker has already is used everywhere. Where the variable is not set, the core's policy decides.
"""

from __future__ import annotations

import os

from mesh_core import hookimpl
from mesh_core.loras.policy import LoraFacts, LoraPlacement
from mesh_core.model import BlockSpan
from mesh_core.model.plan import WorkerInfo


@hookimpl
def mesh_place_lora(lora: LoraFacts, stage: BlockSpan, worker: WorkerInfo) -> LoraPlacement | None:
    friends = {name.strip() for name in os.environ.get("MESH_LORA_FRIENDS", "").split(",") if name.strip()}
    if not friends:
        return None
    if lora.held:
        return LoraPlacement("reference", f"{worker.name} has it")
    # A worker is called "studio (mesh://192.168.0.18:7777)".
    if worker.name.partition(" (")[0] in friends:
        return LoraPlacement("send", f"{worker.name} is a friend")
    return LoraPlacement("refuse", f"{worker.name} is none of {', '.join(sorted(friends))}")
