"""Models that a host program has in memory: seen as a checkpoint, and made to hold the blocks of one span only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mesh_codec.dtypes import from_torch
from mesh_codec.errors import CodecUnsupported
from mesh_core.errors import CheckpointUnrecognised
from mesh_core.model.checkpoint import CheckpointHeader
from mesh_core.model.library import Checkpoint, recognise
from mesh_core.model.numerics import Numerics
from mesh_core.model.spans import BlockSpan
from mesh_core.model.stored import TensorInfo
from mesh_core.model.stored_weight import StoredWeight
from mesh_core.model.weights import WeightReader, assign, moved
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

    Raises:
        CheckpointUnrecognised: a tensor of another class than torch's own: what it holds is not its numbers.
    """
    listed = {}
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, nn.Parameter):
            raise CheckpointUnrecognised(
                f"{name} is a {type(tensor).__name__}, no plain tensor: workers do not compute with quantised weights.",
                hint="the same model in bfloat16, not quantised",
            )
        try:
            dtype = from_torch(tensor.dtype).safetensors
        except CodecUnsupported:
            dtype = str(tensor.dtype).removeprefix("torch.")
        listed[name] = TensorInfo(name, dtype, tuple(tensor.shape), place, 0, tensor.nbytes)
    return CheckpointHeader(place, listed, config=config or {})


def checkpoint_in_memory(model: nn.Module, plugins: Plugins) -> Checkpoint:
    """The checkpoint that a model of diffusers is.

    Raises:
        CheckpointUnrecognised: no adapter knows it, its weights are in a form that none computes with, or it holds
            more than its class has.
    """
    config = {**model.config, "_class_name": type(model).__name__}  # type: ignore[dict-item]
    parameters = dict(model.named_parameters())
    checkpoint = recognise(header_in_memory(parameters, _MEMORY, config), plugins)
    known = {piece.tensor for p in checkpoint.spec.parameters.values() for piece in p.pieces}
    for name in (*parameters, *(name for name, _ in model.named_buffers())):
        if name not in known:
            raise CheckpointUnrecognised(
                f"{name} is in memory and in no {type(model).__name__}: a part of it was replaced, and workers would "
                "compute without it.",
                hint="the model as it was loaded, or all of it on this machine",
            )
        if parameters[name].is_meta:
            raise CheckpointUnrecognised(
                f"{name} holds no data: it was moved away, as enable_sequential_cpu_offload() does.",
                hint="split() before anything is offloaded",
            )
    return checkpoint


def hold_only(
    model: nn.Module, checkpoint: Checkpoint, span: BlockSpan, device: torch.device, numerics: Numerics
) -> None:
    """Have the parameters of ``span`` on the device, and the others off it.

    What was never read is read now. The others are dropped if they lie in files, else moved to the CPU.

    Raises:
        CheckpointError: what is missing cannot be read.
    """
    wanted = checkpoint.spec.parameters_of(span)
    parameters = dict(model.named_parameters())
    missing = {name: spec for name, spec in wanted.items() if parameters[name].is_meta}
    header = checkpoint.header
    if missing:
        WeightReader(header).fill(model, missing, device=device, numerics=numerics)
    for name, parameter in parameters.items():
        if name in wanted and not parameter.is_meta:
            _move(model, name, parameter, device)
        elif name not in wanted and header.stamps:
            assign(model, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
        elif name not in wanted:
            _move(model, name, parameter, torch.device("cpu"))


def _move(model: nn.Module, name: str, parameter: nn.Parameter, device: torch.device) -> None:
    if isinstance(parameter, StoredWeight):
        assign(model, name, moved(parameter, device))
    else:
        parameter.data = parameter.data.to(device)


def look_loaded(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Have a model of which a part was read answer as if diffusers had loaded all of it in ``dtype``."""
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            assign(model, name, nn.Parameter(torch.empty_like(parameter, dtype=dtype), requires_grad=False))
    header = checkpoint.header
    known = {key: header.config[key] for key in ("_class_name", "_diffusers_version") if key in header.config}
    source = header.path / "transformer" if header.folder == header.path else header.path
    cast(Any, model).register_to_config(**known, _name_or_path=str(source))
