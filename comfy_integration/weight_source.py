"""Where a split model's weights come from: a model that ComfyUI loaded whole, or a file of which only a span is read.

Changing the cut of a file source reads or frees the difference. Knows no workers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mesh_core.host.options import ModelIdentity
from mesh_core.host.progress import ProgressReport
from mesh_core.model.library import Checkpoint
from mesh_core.model.spans import BlockSpan
from mesh_core.model.spec import ParameterSpec, Piece
from mesh_core.model.weights import WeightReader
from mesh_core.programs.comfy import ComfySide
from mesh_core.programs.identity import identify

from .identity import identities, unpatched_weights
from .partial_model import ROOT, Weights

UNREAD = "mesh_file"
"""The attachment of a patcher whose weights stay in a file until it is cut."""


class WeightSource(Protocol):
    """Gives the weights of one model of ComfyUI.

    Attributes:
        side: what its family tells about itself inside ComfyUI.
        prefix: before each name in the file, where ComfyUI's model has none.
        bytes_read: from disk so far, for a split.
    """

    checkpoint: Checkpoint
    side: ComfySide
    prefix: str
    bytes_read: int

    def weights(self, span: BlockSpan) -> Weights:
        """The weights of ComfyUI's model that ``span`` needs, on the CPU; None for the others."""

    def identities(self, report: ProgressReport | None) -> Iterable[ModelIdentity]:
        """By what workers may know the model, the likeliest first."""


def names_of(checkpoint: Checkpoint, span: BlockSpan) -> set[str]:
    """The file's tensors that a span needs."""
    return {piece.tensor for p in checkpoint.spec.parameters_of(span).values() for piece in p.pieces}


@dataclass(frozen=True)
class LoadedModel:
    """A model in ComfyUI's memory; the split one has parameters of its own over the same memory."""

    patcher: Any
    checkpoint: Checkpoint
    side: ComfySide
    prefix: str = ""
    bytes_read: int = 0

    def weights(self, span: BlockSpan) -> Weights:
        original, wanted = unpatched_weights(self.patcher), names_of(self.checkpoint, span)
        others = dict(self.patcher.model.named_parameters())

        def weight(name: str) -> Tensor | None:
            if not name.startswith(ROOT):
                return others[name].detach()
            inner = name.removeprefix(ROOT)
            return original(inner).detach().to(self.patcher.offload_device) if inner in wanted else None

        return weight

    def identities(self, report: ProgressReport | None) -> Iterable[ModelIdentity]:
        return identities(self.patcher, self.checkpoint)


@dataclass
class ModelFile:
    """A checkpoint of which the tensors of the last span that was asked for are in memory.

    Attributes:
        dtype: in which ComfyUI holds the weights.
    """

    checkpoint: Checkpoint
    side: ComfySide
    prefix: str
    dtype: torch.dtype
    bytes_read: int = 0
    _held: dict[str, Tensor] = field(default_factory=dict)

    def weights(self, span: BlockSpan) -> Weights:
        wanted = names_of(self.checkpoint, span)
        reader = WeightReader(self.checkpoint.header)
        held: dict[str, Tensor] = {}
        for name in sorted(wanted, key=self.checkpoint.header.place):
            known = self._held.get(name)
            held[name] = known if known is not None else self._read(reader, name)
        self._held = held
        self.bytes_read += reader.bytes_read
        return lambda name: held.get(self.prefix + name.removeprefix(ROOT)) if name.startswith(ROOT) else None

    def _read(self, reader: WeightReader, name: str) -> Tensor:
        info = self.checkpoint.header.tensors[name]
        whole = ParameterSpec(info.shape, info.dtype, (Piece(name),), BlockSpan(0, 1))
        return reader.read(whole).to(self.dtype)

    def identities(self, report: ProgressReport | None) -> Iterable[ModelIdentity]:
        return [identify(self.checkpoint, report)]
