"""For authors of adapters: what an adapter must prove, as functions that a test calls. They raise AssertionError.

The reference is always the model class's own forward, on the same device and dtype, and the demand is equality of
every bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from shutil import copytree
from typing import Any

import torch
from torch import Tensor, nn

from mesh_core.model.adapter import ModelAdapter, Stage
from mesh_core.model.checkpoint import CheckpointHeader, read_header
from mesh_core.model.library import Checkpoint
from mesh_core.model.numerics import Numerics
from mesh_core.model.shapes import foretell, resolve
from mesh_core.model.spans import BlockSpan
from mesh_core.model.spec import Conditioning, ModelSpec
from mesh_core.model.tensors import stored_tensors
from mesh_core.model.weights import WeightReader
from mesh_core.programs.in_memory import numerics_in_memory


def check_every_cut(
    adapter: ModelAdapter,
    header: CheckpointHeader,
    reference: nn.Module,
    *inputs: Mapping[str, Any],
    device: torch.device | str = "cpu",
) -> int:
    """Stages loaded from ``header`` and composed equal ``reference(**inputs)``: for every single cut, and for one
    stage per block.

    Args:
        reference: the whole model with the same weights, on ``device``, in the dtype to test, as diffusers loads it:
            parameters that it has in another type are so in the stages, and what its class computes besides must equal.
        inputs: one or several sets of arguments of its forward, without ``return_dict``; on ``device``. All are run
            through the same stages, as sessions share them.

    Returns the number of compositions that were compared for each.
    """
    spec = _recognised(adapter, header)
    numerics = numerics_in_memory(Numerics(_dtype_of(reference)), reference, Checkpoint(header, spec, adapter))

    @cache
    def stage_of(span: BlockSpan) -> Stage:
        return adapter.build_stage(spec, span, WeightReader(header), device=device, numerics=numerics)

    compositions = [(k,) for k in range(spec.blocks + 1)] + [tuple(range(1, spec.blocks))]
    for given in inputs:
        with torch.no_grad():
            expected = _tensors(reference(**given, return_dict=False))
        for cuts in compositions:
            found = _tensors(_composed(adapter, spec, given, cuts, stage_of))
            for e, f in zip(expected, found, strict=True):
                assert torch.equal(e, f), f"cut at {cuts}: differs by up to {(e - f).abs().max().item():g}"
    return len(compositions)


def _composed(
    adapter: ModelAdapter,
    spec: ModelSpec,
    inputs: Mapping[str, Any],
    cuts: tuple[int, ...],
    stage_of: Callable[[BlockSpan], Stage],
) -> Tensor | tuple[Tensor, ...]:
    state, conditioning = adapter.begin(spec, inputs)
    undeclared = conditioning.constants.keys() - spec.constants.keys()
    assert not undeclared, f"undeclared constants: {sorted(undeclared)}"
    for start, stop in zip((0, *cuts), (*cuts, spec.blocks), strict=True):
        span = BlockSpan(start, stop)
        assert state.keys() <= spec.states[start].keys(), f"undeclared state at cut {start}: {sorted(state)}"
        missing = spec.states[start].keys() - spec.optional - state.keys()
        assert not missing, f"state missing at cut {start}: {sorted(missing)}"
        needed = set(spec.constants_of(span))
        part = Conditioning({n: t for n, t in conditioning.constants.items() if n in needed}, conditioning.options)
        # Off the wire, everything is in row-major order.
        held = {name: tensor.contiguous() for name, tensor in {**state, **part.constants}.items()}
        resolve(adapter.shapes(spec, start), {name: tensor.shape for name, tensor in held.items()})
        state, part.constants = ({n: held[n] for n in names} for names in (state, part.constants))
        before = {name: tensor.clone() for name, tensor in held.items()}
        given = {name: tensor.shape for name, tensor in held.items()}
        foretold = foretell(adapter.shapes(spec, start), given, adapter.shapes(spec, stop)) if len(span) else {}
        with torch.no_grad():
            state = stage_of(span)(state, part)
        for name, shape in ((n, s) for n, s in foretold.items() if n in state):
            assert tuple(state[name].shape) == shape, (
                f"{name} at cut {stop} has {tuple(state[name].shape)}, not {shape}"
            )
        for name, tensor in before.items():
            assert torch.equal(tensor, held[name]), f"the stage {span} changed its input {name!r} in place"
    return adapter.finish(spec, state)


def check_reads_only_its_own(adapter: ModelAdapter, header: CheckpointHeader) -> None:
    """The stages of all single blocks read their own parameters from disk, and no byte more."""
    spec = _recognised(adapter, header)
    dtype = torch.float32
    for start in range(spec.blocks):
        span = BlockSpan(start, start + 1)
        reader = WeightReader(header)
        stage = adapter.build_stage(spec, span, reader, device="cpu", numerics=Numerics(dtype))
        own = spec.parameters_of(span)
        held = {name for name, tensor in stored_tensors(stage.model).items() if not tensor.is_meta}
        assert held == set(own), f"stage {span} holds {sorted(held ^ set(own))} more or less than the spec says"
        size = sum(_file_bytes(header, spec, name) for name in own)
        assert reader.bytes_read == size, f"stage {span} read {reader.bytes_read} bytes, its parameters have {size}"


def check_recognises_without_data(adapter: ModelAdapter, path: Path, scratch: Path) -> None:
    """Recognising a copy of the checkpoint at ``path`` whose tensor data is all zero gives the same spec."""
    copy = scratch / path.name
    if path.is_dir():
        copytree(path, copy)
    else:
        copy.write_bytes(path.read_bytes())
    original = _recognised(adapter, read_header(path))
    header = read_header(copy)
    for file in header.files:
        start = min(t.offset for t in header.tensors.values() if t.file == file)
        size = file.stat().st_size
        with file.open("r+b") as stream:
            stream.truncate(start)
            stream.truncate(size)
    blank = _recognised(adapter, read_header(copy))
    assert blank.parameters == original.parameters and blank.config == original.config


def _recognised(adapter: ModelAdapter, header: CheckpointHeader) -> ModelSpec:
    spec = adapter.recognise(header)
    assert spec is not None, f"{adapter.family} does not recognise {header.path}"
    return spec


def _dtype_of(model: nn.Module) -> torch.dtype:
    """Of the state; diffusers' models say it."""
    found = getattr(model, "dtype", None)
    return found if isinstance(found, torch.dtype) else next(model.parameters()).dtype


def _file_bytes(header: CheckpointHeader, spec: ModelSpec, name: str) -> int:
    parameter = spec.parameters[name]
    whole = sum(header.tensors[p.tensor].nbytes for p in parameter.pieces if p.stop is None)
    rows = [p for p in parameter.pieces if p.stop is not None]
    for piece in rows:
        info = header.tensors[piece.tensor]
        whole += info.nbytes // info.shape[0] * ((piece.stop or 0) - piece.start)
    return whole


def _tensors(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)
