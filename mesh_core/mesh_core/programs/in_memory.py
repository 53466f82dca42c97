"""Models that a host program has in memory: seen as a checkpoint, and made to hold the blocks of one span only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mesh_codec.dtypes import from_torch
from mesh_codec.errors import CodecUnsupported
from mesh_core.errors import CheckpointUnrecognised
from mesh_core.model.checkpoint import CheckpointHeader
from mesh_core.model.constructing import hashes
from mesh_core.model.library import Checkpoint, recognise
from mesh_core.model.numerics import Numerics
from mesh_core.model.spans import BlockSpan
from mesh_core.model.stored import StoredTensor, TensorInfo
from mesh_core.model.stored_weight import StoredWeight
from mesh_core.model.tensors import computed_tensors, emptied, stored_tensors, types_beside
from mesh_core.model.weights import WeightReader, assign, moved
from mesh_core.plugins.registry import Plugins
from mesh_core.programs.held_weights import as_stored, refuse_other_arithmetic

_MARKER = 1 << 16
"""Bytes of a tensor that may name a format."""

_MEMORY = Path("(weights in memory)")
"""Stands for the file of a model that diffusers loaded."""

_COMPUTED_IN = (torch.float32, torch.float16, torch.bfloat16)


def header_in_memory(
    tensors: Mapping[str, Tensor], place: Path, plugins: Plugins, config: Mapping[str, Any] | None = None
) -> CheckpointHeader:
    """Tensors as the header of a file would list them; types that no codec knows keep torch's name for them.

    Args:
        place: stands for the file in messages; nothing is read from it.
        config: the model's own, as in ``config.json``.

    Raises:
        CheckpointUnrecognised: a tensor of another class than torch's own, which no format knows.
    """
    listed = {}
    markers = {n: t for n, t in tensors.items() if t.dtype == torch.uint8 and t.dim() == 1 and t.numel() < _MARKER}
    for name, held in tensors.items():
        tensor = as_stored(name, held, plugins)
        if isinstance(tensor, StoredWeight):
            listed[name] = _stored_info(name, tensor, place)
            continue
        try:
            dtype = from_torch(tensor.dtype).safetensors
        except CodecUnsupported:
            dtype = str(tensor.dtype).removeprefix("torch.")
        listed[name] = TensorInfo(name, dtype, tuple(tensor.shape), place, 0, tensor.nbytes)
    return CheckpointHeader(place, listed, config=config or {}, values=markers)


def _stored_info(name: str, weight: StoredWeight, place: Path) -> TensorInfo:
    parts = {
        role: TensorInfo(f"{name}:{role}", from_torch(t.dtype).safetensors, tuple(t.shape), place, 0, t.nbytes)
        for role, t in weight.parts.items()
    }
    stored = StoredTensor(weight.format, weight.kind, tuple(weight.shape), parts)
    return TensorInfo(name, stored.label, stored.shape, place, 0, weight.nbytes, stored)


def checkpoint_in_memory(
    model: nn.Module, plugins: Plugins, source: str | os.PathLike[str] | None = None
) -> Checkpoint:
    """The checkpoint that a model of diffusers is.

    Args:
        source: what it was loaded from, where the model itself does not know.

    Raises:
        CheckpointUnrecognised: no adapter knows it, its weights are in a form that none computes with, or it holds
            more than its class has.
    """
    config = {**model.config, "_class_name": type(model).__name__}  # type: ignore[dict-item]
    if source is not None:
        config["_name_or_path"] = str(source)
    parameters = stored_tensors(model)
    checkpoint = recognise(header_in_memory(parameters, _MEMORY, plugins, config), plugins)
    _refuse_bare_codes(parameters)
    refuse_other_arithmetic(model)
    known = {piece.tensor for p in checkpoint.spec.parameters.values() for piece in p.pieces}
    known |= _computed_by_class(checkpoint)
    for name in (*parameters, *(name for name, _ in model.named_buffers())):
        if name not in known:
            raise CheckpointUnrecognised(
                f"{name} is in memory and in no {type(model).__name__}: a part of it was replaced, and workers would "
                "compute without it.",
                hint="the model as it was loaded, or all of it on this machine",
            )
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise CheckpointUnrecognised(
                f"{name} holds no data: it was moved away, as enable_sequential_cpu_offload() does.",
                hint="split() before anything is offloaded",
            )
    return checkpoint


def _refuse_bare_codes(parameters: Mapping[str, Tensor]) -> None:
    for name, tensor in parameters.items():
        if not isinstance(tensor, StoredWeight) and tensor.is_floating_point() and tensor.element_size() == 1:
            raise CheckpointUnrecognised(
                f"{name} is held as {tensor.dtype}, which torch does not multiply with: whatever casts it for each "
                "step would not do so on workers.",
                hint="the fp8 file itself, with load_pipeline(file, components=folder); or the model in bfloat16",
            )


def numerics_in_memory(numerics: Numerics, model: nn.Module, checkpoint: Checkpoint) -> Numerics:
    """``numerics`` with the types that a model in memory holds its parameters in, and the tensors beside them.

    Raises:
        CheckpointUnrecognised: it lacks a tensor that its class computes, or has parameters in other types than models
            compute in.
    """
    held, names = computed_tensors(model), _computed_by_class(checkpoint)
    # More than these is what a model that ran keeps of its inputs.
    for name in sorted(names):
        if name not in held or held[name].is_meta:
            raise CheckpointUnrecognised(
                f"{name}, which a {type(model).__name__} computes when it is made, is not in memory: a part of it was "
                "replaced.",
                hint="the model as it was loaded, or all of it on this machine",
            )
    computed = tuple(sorted(hashes({name: held[name] for name in names}).items()))
    others = types_beside(stored_tensors(model), numerics.dtype)
    for name, dtype in others:
        if dtype not in _COMPUTED_IN:
            raise CheckpointUnrecognised(
                f"{name} is {dtype} in memory; workers compute in float32, float16 and bfloat16.",
                hint="the transformer in such a type, for example pipe.transformer.to(torch.bfloat16)",
            )
    return replace(numerics, others=others, computed=computed)


def _computed_by_class(checkpoint: Checkpoint) -> set[str]:
    with torch.device("meta"):
        return set(computed_tensors(checkpoint.adapter.skeleton(checkpoint.spec)))


def hold_only(
    model: nn.Module, checkpoint: Checkpoint, span: BlockSpan, device: torch.device, numerics: Numerics
) -> None:
    """Have the parameters of ``span`` on the device, and the others off it.

    What was never read is read now. The others are dropped if they lie in files, else moved to the CPU.

    Raises:
        CheckpointError: what is missing cannot be read.
    """
    wanted = checkpoint.spec.parameters_of(span)
    parameters = stored_tensors(model)
    missing = {name: spec for name, spec in wanted.items() if parameters[name].is_meta}
    header = checkpoint.header
    if missing:
        WeightReader(header).fill(model, missing, device=device, numerics=numerics)
    for name, parameter in parameters.items():
        if name in wanted and not parameter.is_meta:
            _move(model, name, parameter, device)
        elif name not in wanted and header.stamps:
            assign(model, name, emptied(parameter))
        elif name not in wanted:
            _move(model, name, parameter, torch.device("cpu"))


def _move(model: nn.Module, name: str, parameter: Tensor, device: torch.device) -> None:
    if isinstance(parameter, StoredWeight):
        assign(model, name, moved(parameter, device))
    else:
        parameter.data = parameter.data.to(device)


def look_loaded(model: nn.Module, checkpoint: Checkpoint, numerics: Numerics) -> None:
    """Have a model of which a part was read answer as if diffusers had loaded all of it in these types."""
    for name, parameter in stored_tensors(model).items():
        if parameter.is_meta:
            assign(model, name, emptied(parameter, numerics.dtype_of(name, checkpoint.spec.parameters[name])))
    header = checkpoint.header
    known = {key: header.config[key] for key in ("_class_name", "_diffusers_version") if key in header.config}
    source = header.path / "transformer" if header.folder == header.path else header.path
    cast(Any, model).register_to_config(**known, _name_or_path=str(source))
