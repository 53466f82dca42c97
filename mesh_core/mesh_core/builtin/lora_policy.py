"""The built-in ``mesh_place_lora``: the policies that a setting chooses from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh_core.hookspecs import hookimpl
from mesh_core.loras.policy import LoraFacts, LoraPlacement

if TYPE_CHECKING:
    from mesh_core.model.plan import WorkerInfo
    from mesh_core.model.spans import BlockSpan


class DefaultLoraPlacement:
    """Built-in ``mesh_place_lora``.

    ``default``: what the worker has is referenced; what is small is sent; what is large is refused unless the user
    asked for it. ``always-send``: whatever it lacks is sent. ``never-send`` and ``worker-only``: what it lacks is
    refused, or left out of its blocks. ``local-only``: LoRAs change the host's blocks alone.
    """

    @hookimpl(trylast=True)
    def mesh_place_lora(self, lora: LoraFacts, stage: BlockSpan, worker: WorkerInfo) -> LoraPlacement:
        size = f"{lora.nbytes / 1e6:.1f} MB"
        if lora.policy == "local-only":
            return LoraPlacement("leave-out", "the policy is local-only")
        if lora.held:
            return LoraPlacement("reference", f"{worker.name} has it")
        if lora.policy == "never-send":
            return LoraPlacement("refuse", f"{worker.name} does not have it and the policy is never-send")
        if lora.policy == "worker-only":
            return LoraPlacement("leave-out", f"{worker.name} does not have it and the policy is worker-only")
        if lora.asked or lora.policy == "always-send":
            return LoraPlacement("send", f"{size}, as was asked for")
        if lora.nbytes <= lora.limit:
            return LoraPlacement("send", f"{size} are within the {lora.limit / 1e6:.0f} MB that are sent unasked")
        return LoraPlacement("refuse", f"{size} are more than the {lora.limit / 1e6:.0f} MB that are sent unasked")
