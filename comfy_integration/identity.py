"""What a model that ComfyUI holds is: its family, its blocks, and the fingerprint that workers know it by.

ComfyUI may hold weights in another type than the file has (on a CPU bfloat16 becomes float32), and workers hash what
is in the file. So the hash is taken over the weights in memory, in the types that a file of this model may have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mesh_codec.dtypes import from_safetensors
from mesh_core.errors import CheckpointError, CheckpointUnrecognised
from mesh_core.host.options import ModelIdentity
from mesh_core.model import fingerprint
from mesh_core.model.checkpoint import read_header
from mesh_core.model.claims import with_stored_weights
from mesh_core.model.library import Checkpoint, recognise
from mesh_core.model.spec import ModelSpec, ParameterSpec
from mesh_core.model.stored_weight import StoredWeight
from mesh_core.model.weights import WeightReader
from mesh_core.plugins.registry import Plugins
from mesh_core.programs.comfy import ComfySide, header_of
from mesh_core.programs.comfy_recognition import recognise_module
from mesh_core.programs.comfy_weights import apart, stored_weight
from mesh_core.programs.identity import identify
from mesh_core.system.logs import logger

from .partial_model import ROOT

log = logger(__name__)

_FOLDERS = ("diffusion_models", "checkpoints")


_Known = dict[str, ModelIdentity | None]
"""What was found of one model, by what was tried; None: it cannot be that."""

_known: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()


def recognised(model: Any, plugins: Plugins) -> tuple[Checkpoint, ComfySide]:
    """The checkpoint that ``model`` (ComfyUI's BaseModel) is, and its family's side of ComfyUI.

    Raises:
        CheckpointUnrecognised: no adapter knows it, or its weights are in a form that none computes with.
        PluginNotFound: the adapter does not know ComfyUI.
    """
    header = with_stored_weights(header_of(model.diffusion_model), plugins.weight_formats().values())
    try:
        return recognise_module(model.diffusion_model, plugins)
    except CheckpointUnrecognised as error:
        kind = type(model).__name__
        found = ", ".join(sorted({t.dtype for t in header.tensors.values()}))
        families = ", ".join(sorted(plugins.adapters())) or "none"
        raise CheckpointUnrecognised(
            f"No installed adapter can cut this model ({kind}, weights {found}). Installed: {families}.",
            hint="the loader's weight_dtype 'default', a bfloat16 file, or the adapter for this family",
        ) from error


def unpatched_weights(patcher: Any) -> Callable[[str], Tensor]:
    """The unpatched weights of a patcher's model by ComfyUI's names of them."""
    own = dict(patcher.model.diffusion_model.named_parameters())
    kept = {name.removeprefix(ROOT): entry.weight for name, entry in patcher.backup.items()}
    kept |= {name.removeprefix(ROOT): entry[0] for name, entry in patcher.hook_backup.items()}
    return lambda name: kept[name] if name in kept else own[name]


def identities(patcher: Any, checkpoint: Checkpoint) -> Iterable[ModelIdentity]:
    """By what workers may know the weights in ``patcher``'s memory, the likeliest first; each is hashed once.

    Raises:
        CheckpointUnrecognised: while iterating: no file of this model can hold these weights.
    """
    weights = _Weights(checkpoint, unpatched_weights(patcher))
    return _find(checkpoint.spec, weights, _known.setdefault(patcher.model, {}))


@dataclass(frozen=True)
class _Weights:
    """A model's parameters, from weights that ``held`` gives by ComfyUI's names."""

    checkpoint: Checkpoint
    held: Callable[[str], Tensor]

    def __call__(self, name: str) -> Tensor:
        """On the CPU; a `StoredWeight` if it is stored in a format."""
        parameter = self.checkpoint.spec.parameters[name]
        if parameter.in_a_format:
            return stored_weight(parameter, self.checkpoint.header, self._tensor, torch.float32)
        pieces = [self.held(p.tensor).detach()[p.start : p.stop].cpu() for p in parameter.pieces]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _tensor(self, name: str) -> Tensor:
        """One of those that a file holds for a weight: scales are parameters, or parts of the quantised weight."""
        weight = f"{name.rpartition('.')[0]}.weight"
        if name != weight:
            try:
                return self.held(name)
            except KeyError:
                pass
        return apart(weight, self.held(weight))[name]


def _find(spec: ModelSpec, weights: _Weights, known: _Known) -> Iterator[ModelIdentity]:
    seen: set[str] = set()
    for claimed in _as_in_files(spec):
        structure = fingerprint.structure(claimed)
        if structure not in seen:
            seen.add(structure)
            if structure not in known:
                known[structure] = _hashed(claimed, structure, weights)
            identity = known[structure]
            if identity is not None:
                yield identity
    yield from _from_wider_files(spec, weights, known)


def _candidates() -> Iterator[Path]:
    import folder_paths

    for folder in _FOLDERS:
        for name in folder_paths.get_filename_list(folder):
            if name.endswith(".safetensors"):
                path = folder_paths.get_full_path(folder, name)
                if path is not None:
                    yield Path(path)


def _files_like(spec: ModelSpec) -> Iterator[Checkpoint]:
    from mesh_core.builtin import installed_plugins

    shapes = {name: p.shape for name, p in spec.parameters.items()}
    for path in _candidates():
        try:
            found = recognise(read_header(path), installed_plugins())
        except CheckpointError as error:
            log.debug("%s is not looked at: %s", path, error)
            continue
        if found.spec.family == spec.family and {n: p.shape for n, p in found.spec.parameters.items()} == shapes:
            yield found


def _stored(spec: ModelSpec) -> dict[str, str]:
    """The parameters that are stored in a format, with its label: they are what they are in memory and in files."""
    return {name: p.dtype for name, p in spec.parameters.items() if p.in_a_format}


def _as_in_files(spec: ModelSpec) -> Iterator[ModelSpec]:
    """The types that a file may have: those of files here with these shapes, one for all, those in memory."""
    for found in _files_like(spec):
        if _stored(found.spec) == _stored(spec):
            yield _retyped(spec, {name: p.dtype for name, p in found.spec.parameters.items()})
    for dtype in ("BF16", "F16", "F32"):
        yield _retyped(spec, {**dict.fromkeys(spec.parameters, dtype), **_stored(spec)})
    yield spec


def _retyped(spec: ModelSpec, dtypes: Mapping[str, str]) -> ModelSpec:
    return replace(spec, parameters={n: replace(p, dtype=dtypes[n]) for n, p in spec.parameters.items()})


def _hashed(spec: ModelSpec, structure: str, weights: _Weights) -> ModelIdentity | None:
    """The identity of the weights in the types of ``spec``; None when that would change a weight."""

    class Loses(Exception):
        pass

    def value(name: str) -> Tensor:
        held, parameter = weights(name), spec.parameters[name]
        if isinstance(held, StoredWeight):
            return held
        cast = held.to(from_safetensors(parameter.dtype).torch)
        if cast.dtype != held.dtype and not torch.equal(cast.to(held.dtype), held):
            raise Loses
        if cast.element_size() > held.element_size():
            raise Loses  # a wider file would hold more than what is here
        return cast

    try:
        return ModelIdentity(spec, structure, fingerprint.of_values(spec, value))
    except Loses:
        return None


def _from_wider_files(spec: ModelSpec, weights: _Weights, known: _Known) -> Iterator[ModelIdentity]:
    """Files with more bits than ComfyUI kept, or quantised ones that it holds as plain numbers: what they hold is, in
    the types in memory, what is in memory."""
    if _stored(spec):
        return
    for found in _files_like(spec):
        reader = WeightReader(found.header)
        wider = all(p.in_a_format or _itemsize(p) >= _itemsize(spec.parameters[n]) for n, p in _parameters(found))
        if not wider or found.spec.dtypes == spec.dtypes:
            continue
        key = repr(sorted(found.header.stamps.items()))
        if key not in known:
            same = all(torch.equal(_numbers(reader, p, held.dtype), held) for p, held in _beside(found, weights))
            known[key] = identify(found) if same else None
        identity = known[key]
        if identity is not None:
            yield identity


def _parameters(found: Checkpoint) -> Iterable[tuple[str, ParameterSpec]]:
    return found.spec.parameters.items()


def _beside(found: Checkpoint, weights: _Weights) -> Iterator[tuple[ParameterSpec, Tensor]]:
    """A file's parameters with what is in memory."""
    for name, parameter in _parameters(found):
        yield parameter, weights(name)


def _itemsize(parameter: ParameterSpec) -> int:
    return from_safetensors(parameter.dtype).itemsize


def _numbers(reader: WeightReader, parameter: ParameterSpec, dtype: torch.dtype) -> Tensor:
    """A file's parameter as plain numbers."""
    return reader.read_stored(parameter, dtype).dense() if parameter.in_a_format else reader.read(parameter).to(dtype)
