"""Models that a host program has in memory: seen as a checkpoint, and made to hold the blocks of one span only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mesh_codec.dtypes import from_torch
from mesh_codec.errors import CodecUnsupported
from mesh_core.model.checkpoint import CheckpointHeader
from mesh_core.model.library import Checkpoint, recognise
from mesh_core.model.safetensors import TensorInfo
from mesh_core.model.spans import BlockSpan
from mesh_core.model.weights import WeightReader, assign
from mesh_core.plugins.registry import Plugins

_MEMORY = Path("(weights in memory)")
"""Stands for the file of a model that diffusers loaded."""


def header_in_memory(
    tensors: Mapping[str, Tensor], place: Path, config: Mapping[str, Any] | None = None
) -> CheckpointHeader:
    """Tensors as the header of a file would list them; types that no codec knows keep torch's name for them.

    Args:
        place: stands for the file in messages; nothing is read from it.
        config: the model's own, as in ``config.json``.
    """
    listed = {}
    for name, tensor in tensors.items():
        try:
            dtype = from_torch(tensor.dtype).safetensors
        except CodecUnsupported:
            dtype = str(tensor.dtype).removeprefix("torch.")
        listed[name] = TensorInfo(name, dtype, tuple(tensor.shape), place, 0, tensor.nbytes)
    return CheckpointHeader(place, listed, config=config or {})


def checkpoint_in_memory(model: nn.Module, plugins: Plugins) -> Checkpoint:
    """The checkpoint that a model of diffusers is.

    Raises:
        CheckpointUnrecognised: no adapter knows it, or its weights are in a form that none computes with.
    """
    config = {**model.config, "_class_name": type(model).__name__}  # type: ignore[dict-item]
    return recognise(header_in_memory(dict(model.named_parameters()), _MEMORY, config), plugins)


def hold_only(
    model: nn.Module, checkpoint: Checkpoint, span: BlockSpan, device: torch.device, dtype: torch.dtype
) -> None:
    """Have the parameters of ``span`` on the device, and the others off it.

    What was never read is read now, in ``dtype``. The others are dropped if they can be read again, else moved to the
    CPU.

    Raises:
        CheckpointError: what is missing cannot be read.
    """
    wanted = checkpoint.spec.parameters_of(span)
    parameters = dict(model.named_parameters())
    missing = {name: spec for name, spec in wanted.items() if parameters[name].is_meta}
    header = checkpoint.header
    if missing:
        WeightReader(header).fill(model, missing, device=device, dtype=dtype)
    from_file = header.path != _MEMORY and all(file.is_file() for file in header.files)
    for name, parameter in parameters.items():
        if name in wanted and not parameter.is_meta:
            parameter.data = parameter.data.to(device)
        elif name not in wanted and from_file:
            assign(model, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
        elif name not in wanted:
            parameter.data = parameter.data.to("cpu")
