"""What a session is opened with: the model that all ends must hold, and how its steps are to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from mesh_codec.qualities import EXACT, Quality
from mesh_core.model.numerics import Numerics
from mesh_core.model.spec import ModelSpec
from mesh_core.system.config import Settings


@dataclass(frozen=True)
class ModelIdentity:
    """The model that all ends must hold. ``structure``, ``fingerprint``: see `mesh_core.model.fingerprint`."""

    spec: ModelSpec
    structure: str
    fingerprint: str


@dataclass(frozen=True)
class SessionOptions:
    """How the steps of a session run.

    Attributes:
        numerics: in which stages compute, here and at the workers.
        device: where the host wants the result.
        codec: by name, for the hidden state; None for the one that is fastest.
        watch: called at least twice a second while a worker is waited for; what it raises stops the work there too.
    """

    numerics: Numerics
    device: torch.device
    quality: Quality = EXACT
    settings: Settings = field(default_factory=Settings)
    codec: str | None = None
    watch: Callable[[], None] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the state."""
        return self.numerics.dtype
