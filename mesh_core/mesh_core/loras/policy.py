"""Where a worker gets a LoRA from: the facts that a policy decides on, and the core's own policies.

The policy is the hook ``mesh_place_lora``; which of the core's is used is a setting. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
