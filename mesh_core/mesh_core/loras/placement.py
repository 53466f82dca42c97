"""Where a worker gets a LoRA from: the facts that a policy decides on, and the core's own policies.

The policy is the hook ``mesh_place_lora``; which of the core's is used is a setting. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mesh_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from mesh_core.plan import WorkerInfo
    from mesh_core.spans import BlockSpan

Action = Literal["reference", "send", "refuse", "leave-out"]
"""``reference``: the worker uses what it has. ``send``: it is sent what it lacks. ``refuse``: an error tells the user.
``leave-out``: the span runs without it."""


@dataclass(frozen=True)
class LoraFacts:
    """A LoRA that a host wants on a worker's span.

    Attributes:
        nbytes: of its part for the span; what would be sent, less the tensors that the worker has from other parts.
        total: of all of it.
        held: the worker has the same content.
        policy: the one of the core's policies that the user's settings name.
        limit: bytes that the user's settings allow to be sent unasked.
        asked: the user asked for this LoRA to be sent, however large.
    """

    name: str
    id: str
    nbytes: int
    total: int
    held: bool
    policy: str
    limit: int
    asked: bool = False


@dataclass(frozen=True)
class LoraPlacement:
    """What is done, and why, in words for people."""

    action: Action
    reason: str


POLICIES = ("default", "always-send", "never-send", "worker-only", "local-only")


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
