"""LoRAs are sent to the workers named in MESH_LORA_FRIENDS (separated by commas), however large, and to no others.

What a worker has already is used everywhere. Where the variable is not set, the core's policy decides.
"""

from __future__ import annotations

import os

from mesh_core.hookspecs import BlockSpan, LoraFacts, LoraPlacement, WorkerInfo, hookimpl


@hookimpl
def mesh_place_lora(lora: LoraFacts, stage: BlockSpan, worker: WorkerInfo) -> LoraPlacement | None:
    """Friends are sent what they lack; strangers get what they have already, or an error that says why not."""
    friends = {name.strip() for name in os.environ.get("MESH_LORA_FRIENDS", "").split(",") if name.strip()}
    if not friends:
        return None
    if lora.held:
        return LoraPlacement("reference", f"{worker.name} has it")
    # A worker is called "studio (mesh://192.168.0.18:7777)".
    if worker.name.partition(" (")[0] in friends:
        return LoraPlacement("send", f"{worker.name} is a friend")
    return LoraPlacement("refuse", f"{worker.name} is none of {', '.join(sorted(friends))}")
