"""Describing a checkpoint: an adapter says which rows of which file tensors make a parameter, and which blocks need
it; that every tensor is there, in a shape and type that can be used, is checked here.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mesh_core.errors import CheckpointCorrupt, CheckpointUnrecognised
from mesh_core.model.checkpoint import CheckpointHeader
from mesh_core.model.claims import refuse_companions
from mesh_core.model.spans import BlockSpan
from mesh_core.model.spec import ParameterSpec, Piece
from mesh_core.model.stored import StoredTensor
from mesh_core.model.tensors import stored_tensors

COMPUTED_TYPES = ("BF16", "F16", "F32")
"""The types of weights that stages compute with, as safetensors names them."""

LARGEST_SIZE = 1 << 20
"""Of a width, a number of heads or of blocks."""

WHOLE_NUMBERS = ("BOOL", "U8", "I8", "I16", "I32", "I64")
"""The types that buffers without fractions may have."""


def diffusers_class(name: str) -> type[nn.Module]:
    """The model class of that name in diffusers, which is imported for it.

    Raises:
        AttributeError: the diffusers that is installed has none.
    """
    found: type[nn.Module] = getattr(importlib.import_module("diffusers"), name)
    return found


def full_config(model_class: type[nn.Module], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``model_class``: those of ``given`` that it knows, and its defaults."""
    known = inspect.signature(model_class.__init__).parameters
    defaults = {k: p.default for k, p in known.items() if p.default is not inspect.Parameter.empty}
    return {**defaults, **{k: v for k, v in given.items() if k in known}}


def check_sizes(
    header: CheckpointHeader, config: Mapping[str, Any], sizes: Sequence[str], blocks: Sequence[str]
) -> None:
    """Refuse arguments of a model class that would take time and memory before anything else shows them wrong.

    Args:
        sizes: the arguments that are widths and numbers of heads.
        blocks: those that are numbers of blocks, each of which has a tensor at least.

    Raises:
        CheckpointCorrupt: one is no whole number, or out of bounds.
    """
    for name in (*sizes, *blocks):
        value, least = config[name], 0 if name in blocks else 1
        if type(value) is not int or not least <= value <= LARGEST_SIZE:
            raise CheckpointCorrupt(f"{header.path} says {name}={value!r:.80}.")
    count = sum(config[name] for name in blocks)
    if not 0 < count <= len(header.tensors):
        raise CheckpointCorrupt(f"{header.path} says {' + '.join(blocks)}={count}, of {len(header.tensors)} tensors.")


def describe_parameters(
    header: CheckpointHeader,
    skeleton: Callable[[], nn.Module],
    pieces: Callable[[str, int], tuple[Piece, ...]],
    scope: Callable[[str], BlockSpan],
) -> dict[str, ParameterSpec]:
    """Every parameter and persistent buffer of a model by its name in the model class.

    Args:
        skeleton: makes the model; called on the meta device.
        pieces: (parameter, its number of rows) -> the rows of file tensors that make it. The tensors may not exist.
        scope: the blocks that need a parameter.

    Raises:
        CheckpointCorrupt: a tensor is missing, or does not have the shape that the model needs; or there is no model of
            such arguments.
        CheckpointUnrecognised: weights of a type that stages do not compute with.
    """
    model = _on_meta(header, skeleton)
    found: dict[str, ParameterSpec] = {}
    used: dict[str, int] = {}
    for name, tensor in stored_tensors(model).items():
        shape = tuple(tensor.shape)
        parts = pieces(name, shape[0] if shape else 1)
        infos = [header.tensors.get(p.tensor) for p in parts]
        missing = [p.tensor for p, info in zip(parts, infos, strict=True) if info is None]
        if missing:
            raise CheckpointCorrupt(f"{header.path} lacks {missing[0]}.")
        dtypes = {info.dtype for info in infos if info is not None}
        stored = [info.stored for info in infos if info is not None and info.stored is not None]
        usable = COMPUTED_TYPES if tensor.is_floating_point() else WHOLE_NUMBERS
        if len(dtypes) > 1 or not (stored or dtypes <= set(usable)):
            raise CheckpointUnrecognised(
                f"{header.path} stores {parts[0].tensor} as {' and '.join(sorted(dtypes))}; numbers are read as "
                f"{', '.join(usable)}, and other types in the formats of docs/reference/weights.md.",
                hint="a bfloat16 copy of the model, on all machines",
            )
        for piece, info in zip(parts, infos, strict=True):
            whole = shape if piece.stop is None else (piece.stop, *shape[1:])
            if info is None or info.shape[1:] != whole[1:] or info.shape[:1] < whole[:1]:
                raise CheckpointCorrupt(f"{header.path}: {piece.tensor} does not have the shape that {name} needs.")
            used[piece.tensor] = max([used.get(piece.tensor, 0), *whole[:1]])
        found[name] = ParameterSpec(shape, dtypes.pop(), parts, scope(name))
        if stored and _is_matrix(model, name):
            found[name] = _as_stored(found[name], stored)
    for tensor_name, rows in used.items():
        if header.tensors[tensor_name].shape[:1] > (rows,):
            raise CheckpointCorrupt(f"{header.path}: {tensor_name} has more rows than the {rows} that the model needs.")
    refuse_companions(header, used)
    return found


def _on_meta(header: CheckpointHeader, skeleton: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return skeleton()
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # A class checks little of what it is given.
        raise CheckpointCorrupt(
            f"{header.path}: its model class cannot be made as the file describes it: {str(error)[:500]}"
        ) from error


def _is_matrix(model: nn.Module, parameter: str) -> bool:
    """Whether it is what a linear layer multiplies with: stages keep it as it is stored. Others are few bytes."""
    owner, _, leaf = parameter.rpartition(".")
    return leaf == "weight" and isinstance(model.get_submodule(owner), nn.Linear)


def _as_stored(spec: ParameterSpec, stored: Sequence[StoredTensor]) -> ParameterSpec:
    rows = [(s.shape[0] if p.stop is None else p.stop) - p.start for p, s in zip(spec.pieces, stored, strict=True)]
    first = stored[0]
    # Pieces of one kind become one weight: a scale that is of the whole weight is held once.
    nbytes = first.format.nbytes(first, sum(rows))
    return replace(spec, stored_bytes=nbytes, transient=first.format.transient(first.kind, spec.shape, torch.bfloat16))


def invisible_arguments(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The arguments of a model class that `ModelSpec.invisible` is to have, equal for equal meaning: files write 1000
    and 1000.0, lists and tuples."""
    return {name: alike(config[name]) for name in names}


def alike(value: Any) -> Any:
    """``value`` such that equal meanings are equal: lists for tuples, floats for whole numbers.

    Raises:
        CheckpointCorrupt: a number without bounds.
    """
    if isinstance(value, (list, tuple)):
        return [alike(item) for item in value]
    try:
        return float(value) if isinstance(value, (int, float)) else value
    except OverflowError as error:
        raise CheckpointCorrupt("A model's configuration has a number beyond all that can be meant.") from error
