"""Where a model is cut: which blocks and which weights are on workers."""

from __future__ import annotations

from dataclasses import dataclass

from mesh_core.model.library import Checkpoint
from mesh_core.model.spec import ModelSpec
from mesh_core.programs.comfy import ComfySide

from .partial_model import ROOT
from .weight_source import WeightSource, elsewhere


@dataclass(frozen=True)
class ModelCut:
    """One cut of one model.

    Attributes:
        side: what its family tells about itself inside ComfyUI.
        local: number of blocks that run here.
        remote_names: ComfyUI's names of the weights that are not here.
    """

    checkpoint: Checkpoint
    side: ComfySide
    local: int
    remote_names: frozenset[str]

    @property
    def spec(self) -> ModelSpec:
        """The whole model's."""
        return self.checkpoint.spec


def cut_at(source: WeightSource, local: int) -> ModelCut:
    """The cut of ``source``'s model behind its first ``local`` blocks."""
    names = frozenset(ROOT + name for name in elsewhere(source, local))
    return ModelCut(source.checkpoint, source.side, local, names)
