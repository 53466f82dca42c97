"""Where a split model's weights come from: a model that ComfyUI loaded whole, or a file of which only a span is read.

Changing the cut of a file source reads or frees the difference. Knows no workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from mesh_core.host.options import ModelIdentity
from mesh_core.host.progress import ProgressReport
from mesh_core.model.library import Checkpoint
from mesh_core.model.spans import BlockSpan
from mesh_core.model.spec import ModelSpec, ParameterSpec, Piece
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
        names: of the weights of ComfyUI's transformer, which of the checkpoint's tensors each one is.
        bytes_read: from disk so far, for a split.
    """

    checkpoint: Checkpoint
    side: ComfySide
    names: Mapping[str, str]
    bytes_read: int

    def weights(self, local: int) -> Weights:
        """The weights of ComfyUI's model for the first ``local`` blocks, on the CPU; None for those elsewhere."""

    def identities(self, report: ProgressReport | None) -> Iterable[ModelIdentity]:
        """By what workers may know the model, the likeliest first."""


def elsewhere(source: WeightSource, local: int) -> frozenset[str]:
    """ComfyUI's names of the weights that are not here when the first ``local`` blocks are.

    That is what only the blocks behind the cut and the output layers need. Whatever else ComfyUI's transformer has
    runs here, known to the adapter or not: its forward pass and the preparation of conditionings are ComfyUI's own, and
    so are the weights that lie on the transformer itself. No module is here in part.
    """
    spec = source.checkpoint.spec
    behind = _tensors(spec, BlockSpan(0, spec.blocks)) - _tensors(spec, BlockSpan(0, local))
    # What the checkpoint does not list by itself belongs to a stored weight beside it: scales.
    listed = {own for own, tensor in source.names.items() if tensor in source.checkpoint.header.tensors}
    here = {"", *(_module_of(own) for own in listed if source.names[own] not in behind)}
    return frozenset(own for own in source.names if _module_of(own) not in here)


def _tensors(spec: ModelSpec, span: BlockSpan) -> set[str]:
    return {piece.tensor for p in spec.parameters_of(span).values() for piece in p.pieces}


def _module_of(weight: str) -> str:
    return weight.rpartition(".")[0]


@dataclass
class LoadedModel:
    """A model in ComfyUI's memory; the split one has parameters of its own over the same memory."""

    patcher: Any
    checkpoint: Checkpoint
    side: ComfySide
    bytes_read: int = 0

    @cached_property
    def names(self) -> Mapping[str, str]:
        """The checkpoint's tensors are ComfyUI's own."""
        return {name: name for name, _ in self.patcher.model.diffusion_model.named_parameters()}

    def weights(self, local: int) -> Weights:
        original, away = unpatched_weights(self.patcher), elsewhere(self, local)
        others = dict(self.patcher.model.named_parameters())

        def weight(name: str) -> Tensor | None:
            if not name.startswith(ROOT):
                return others[name].detach()
            inner = name.removeprefix(ROOT)
            return None if inner in away else original(inner).detach().to(self.patcher.offload_device)

        return weight

    def identities(self, report: ProgressReport | None) -> Iterable[ModelIdentity]:
        return identities(self.patcher, self.checkpoint)


@dataclass
class ModelFile:
    """A checkpoint of which the tensors that were asked for last are in memory.

    Attributes:
        dtypes: in which ComfyUI holds the checkpoint's tensors.
    """

    checkpoint: Checkpoint
    side: ComfySide
    names: Mapping[str, str]
    dtypes: Mapping[str, torch.dtype]
    bytes_read: int = 0
    _held: dict[str, Tensor] = field(default_factory=dict)

    def weights(self, local: int) -> Weights:
        wanted = {self.names[own] for own in self.names.keys() - elsewhere(self, local)}
        reader = WeightReader(self.checkpoint.header)
        held: dict[str, Tensor] = {}
        for name in sorted(wanted, key=self.checkpoint.header.place):
            known = self._held.get(name)
            held[name] = known if known is not None else self._read(reader, name)
        self._held = held
        self.bytes_read += reader.bytes_read
        return lambda name: held.get(self.names[name.removeprefix(ROOT)]) if name.startswith(ROOT) else None

    def _read(self, reader: WeightReader, name: str) -> Tensor:
        info = self.checkpoint.header.tensors[name]
        whole = ParameterSpec(info.shape, info.dtype, (Piece(name),), BlockSpan(0, 1))
        return reader.read(whole).to(self.dtypes[name])

    def identities(self, report: ProgressReport | None) -> Iterable[ModelIdentity]:
        return [identify(self.checkpoint, report)]
