"""What the user sets in Mesh Split, as the pack takes it. The values of its choices are in saved workflows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from .workers import WorkerRef

if TYPE_CHECKING:
    from mesh_codec.base import Quality
    from mesh_core.system.config import Settings

LORA_POLICIES: Mapping[str, str] = {"automatic": "default", "always send": "always-send", "never send": "never-send"}
"""What the node calls the core's policies for LoRAs that a worker does not have. None of them leaves one out."""


class OnFailure(str, Enum):
    """What happens when a worker goes away during a run."""

    WAIT = "wait for it"
    RUN_HERE = "run here"
    STOP = "stop"


@dataclass(frozen=True)
class SplitSettings:
    """One node's settings.

    Attributes:
        workers: in the order in which they run.
        local: number of blocks that run here; None to have it proposed.
        loras: one of `LORA_POLICIES`.
    """

    workers: Sequence[WorkerRef]
    local: int | None
    quality: Quality
    loras: str
    on_failure: OnFailure

    def of_session(self) -> Settings:
        """This machine's settings, with what the node says instead.

        Raises:
            ConfigError: the settings file cannot be used.
        """
        from mesh_core.system.config import Settings

        settings = Settings.load()
        waits = settings.deadlines.reconnect if self.on_failure is OnFailure.WAIT else 0.0
        return replace(
            settings,
            loras=replace(settings.loras, policy=LORA_POLICIES[self.loras]),
            deadlines=replace(settings.deadlines, reconnect=waits),
        )
