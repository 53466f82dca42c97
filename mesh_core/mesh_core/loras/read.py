"""LoRA files to the canonical form: which tensors of a file make one patch, and of what kind.

A key is an ending, see `mesh_core.loras.endings`, after the name of a module, which is looked up in `ParameterNames`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from mesh_core.errors import LoraError, LoraUnmatched
from mesh_core.loras.bounds import read_lora_header
from mesh_core.loras.endings import split_key
from mesh_core.loras.lora import Lora
from mesh_core.loras.names import ParameterNames, without_prefix
from mesh_core.loras.patch import Patch, Rows
from mesh_core.loras.scaling import Scaling, peft_scaling
from mesh_core.loras.stored import TensorFile
from mesh_core.loras.tensors import HeldTensor, Source
from mesh_core.model.library import Checkpoint
from mesh_core.system.logs import logger

log = logger(__name__)

_LARGEST_ALPHA = 16
"""Bytes of a tensor that holds one number."""


def read_lora(path: str | Path, checkpoint: Checkpoint, name: str = "") -> Lora:
    """The LoRA in a .safetensors file, for the model ``checkpoint``. Reads the header and single numbers only.

    Raises:
        LoraUnmatched: no key names a parameter of the model; it was made for another one.
        LoraError: tensors that do not fit together, or the model.
        CheckpointError: no safetensors file, or a damaged one.
    """
    path = Path(path)
    header = read_lora_header(path)
    file = TensorFile(header)
    sources: dict[str, Source] = {key: file.source(key) for key in header.tensors}
    return lora_of(sources, checkpoint, name or path.stem, header.metadata, where=str(path))


def lora_of_state(
    state: Mapping[str, Tensor], checkpoint: Checkpoint, name: str, metadata: Mapping[str, str], where: str = ""
) -> Lora:
    """The LoRA in a state dict in memory, which came from the file ``where`` if that is known; see `read_lora`."""
    held: dict[str, Source] = {key: HeldTensor(tensor) for key, tensor in state.items()}
    return lora_of(held, checkpoint, name, metadata, where=where or name)


def warn_of_unmatched(lora: Lora) -> Lora:
    """Tell the user which keys of a LoRA that is about to be used change nothing; returns the LoRA."""
    if lora.unmatched:
        shown = ", ".join(lora.unmatched[:3])
        log.warning(
            "%d of the keys of the LoRA %s name no parameter of this %s model and change nothing, for example %s",
            len(lora.unmatched),
            lora.name,
            lora.family,
            shown,
        )
    return lora


def lora_of(
    sources: Mapping[str, Source], checkpoint: Checkpoint, name: str, metadata: Mapping[str, str], *, where: str
) -> Lora:
    """The LoRA that tensors make, by the keys that a file has for them; see `read_lora`.

    Args:
        where: what an error names as the place of the tensors.
    """
    names, spec = names_of(checkpoint), checkpoint.spec
    modules: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    unmatched: list[str] = []
    for key in sources:
        found = split_key(key)
        if found is None:
            unmatched.append(key)
        else:
            stem, algorithm, role = found
            modules[stem][algorithm][role] = key
    scaling = peft_scaling(metadata)
    patches: list[Patch] = []
    for stem, groups in modules.items():
        found_patches, not_found = _patches_of(stem, groups, names, sources, scaling)
        patches += found_patches
        unmatched += not_found
    if not patches:
        raise LoraUnmatched(
            _why_nothing(where, unmatched, spec.family), hint=f"a LoRA that was made for {spec.family} {spec.variant}"
        )
    try:
        return Lora.of(name, spec, patches, unmatched=tuple(sorted(unmatched)), metadata=dict(metadata))
    except LoraError as error:
        raise type(error)(f"{where}: {error.message}", hint=error.hint) from error


def _patches_of(
    stem: str,
    groups: Mapping[str, Mapping[str, str]],
    names: ParameterNames,
    sources: Mapping[str, Source],
    scaling: Scaling,
) -> tuple[list[Patch], list[str]]:
    """What the keys of one module make, by algorithm and role; and the keys that match nothing."""
    shared, bias = groups.get("any", {}), groups.get("bias", {})
    changes = {algorithm: roles for algorithm, roles in groups.items() if algorithm not in ("any", "bias")}
    rows, bias_rows = names.module(stem), names.bias(stem) if bias else None
    unmatched = [] if bias_rows is not None else [*bias.values()]
    if rows is None:
        unmatched += [*shared.values(), *(key for roles in changes.values() for key in roles.values())]
    elif not changes:
        unmatched += shared.values()
    if rows is None and bias_rows is None:
        return [], unmatched
    given = _number(sources[shared["alpha"]], shared["alpha"]) if "alpha" in shared else None
    down = changes.get("lora", {}).get("down")
    rank = next(iter(sources[down].shape), 0) if down is not None else 0
    # In the metadata, names are the model's own, whatever stands before them in keys.
    alpha = scaling(without_prefix(stem), rank) if given is None and rank else given
    patches = []
    if bias_rows is not None:
        factors = {"up": alpha / rank if alpha is not None and rank else None, "diff": None}
        patches += [Patch("diff", bias_rows, {"diff": sources[key]}, factors[role]) for role, key in bias.items()]
    if rows is not None:
        for algorithm, roles in changes.items():
            tensors = {role: sources[key] for role, key in roles.items()}
            if "dora_scale" in shared and algorithm not in ("diff", "set"):
                tensors["dora_scale"] = sources[shared["dora_scale"]]
            patches.append(_patch(algorithm, rows, tensors, alpha if algorithm == "lora" else given))
    return patches, unmatched


def names_of(checkpoint: Checkpoint) -> ParameterNames:
    """The names of the model's parameters; made once per spec object."""
    known = checkpoint.spec.__dict__.get("_lora_names")
    if known is None:
        known = ParameterNames(checkpoint.adapter, checkpoint.spec)
        # A frozen dataclass has a plain dict, which `cached_property` uses in the same way.
        checkpoint.spec.__dict__["_lora_names"] = known
    return cast(ParameterNames, known)


def _patch(algorithm: str, rows: tuple[Rows, ...], tensors: dict[str, Source], alpha: float | None) -> Patch:
    if algorithm == "oft" and len(tensors["blocks"].shape if "blocks" in tensors else ()) == 4:
        algorithm = "boft"
    return Patch(algorithm, rows, tensors, alpha if algorithm not in ("diff", "set") else None)


def _number(source: Source, key: str) -> float:
    if source.nbytes > _LARGEST_ALPHA or len(source.shape) > 1 or (source.shape and source.shape[0] != 1):
        raise LoraError(f"{key} is no single number.", hint="another copy of the file")
    value = float(source.load().to(torch.float64).reshape(()).item())
    if value != value or value in (float("inf"), float("-inf")):
        raise LoraError(f"{key} is {value}.", hint="another copy of the file")
    return value


def _why_nothing(where: str, unmatched: list[str], family: str) -> str:
    if not unmatched:
        return f"{where} holds no LoRA."
    shown = ", ".join(sorted(unmatched)[:3])
    return (
        f"None of the {len(unmatched)} keys of {where} names a parameter of this {family} model, for example {shown}."
    )
