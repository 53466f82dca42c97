"""LoRA files to the canonical form: which tensors of a file make one patch, and of what kind.

Knows the endings that trainers give their tensors (PEFT and diffusers, kohya, LyCORIS, ComfyUI); what stands before
them is looked up in `ParameterNames`.
"""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from math import sqrt
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mesh_core.errors import LoraError, LoraUnmatched
from mesh_core.loras.names import ParameterNames
from mesh_core.loras.patch import Lora, Patch, Rows
from mesh_core.loras.tensors import HeldTensor, Source, TensorFile
from mesh_core.model.checkpoint import read_header
from mesh_core.model.library import Checkpoint

log = logging.getLogger(__name__)

_LARGEST_ALPHA = 16
"""Bytes of a tensor that holds one number."""

# Ending -> (algorithm, role). `lora_A` may carry the name of a PEFT adapter.
_ENDINGS: tuple[tuple[str, str, str], ...] = (
    (r"\.lora_up\.weight", "lora", "up"),
    (r"\.lora_down\.weight", "lora", "down"),
    (r"\.lora_mid\.weight", "lora", "mid"),
    (r"[._]lora\.up\.weight", "lora", "up"),
    (r"[._]lora\.down\.weight", "lora", "down"),
    (r"\.lora_linear_layer\.up\.weight", "lora", "up"),
    (r"\.lora_linear_layer\.down\.weight", "lora", "down"),
    (r"\.lora_B(?:\.[^.]+)?\.bias", "bias", "diff"),
    (r"\.lora_B(?:(?:\.[^.]+)?\.weight)?", "lora", "up"),
    (r"\.lora_A(?:(?:\.[^.]+)?\.weight)?", "lora", "down"),
    (r"\.lora_magnitude_vector(?:(?:\.[^.]+)?\.weight)?", "lora", "magnitude"),
    (r"\.hada_(w[12]_[ab]|t[12])", "loha", ""),
    (r"\.lokr_(w[12]|w[12]_[ab]|t2)", "lokr", ""),
    (r"\.([ab][12])\.weight", "glora", ""),
    (r"\.oft_blocks", "oft", "blocks"),
    (r"\.rescale", "oft", "rescale"),
    (r"\.(?:diff|w_norm)", "diff", "diff"),
    (r"\.(?:diff_b|b_norm)", "bias", "diff"),
    (r"\.set_weight", "set", "value"),
    (r"\.dora_scale", "any", "dora_scale"),
    (r"\.alpha", "any", "alpha"),
)
_KEY = re.compile(f"(?P<stem>.+?)(?:{'|'.join(f'(?P<k{i}>{e})' for i, (e, _, _) in enumerate(_ENDINGS))})")


def read_lora(path: str | Path, checkpoint: Checkpoint, name: str = "") -> Lora:
    """The LoRA in a .safetensors file, for the model ``checkpoint``. Reads the header and single numbers only.

    Raises:
        LoraUnmatched: no key names a parameter of the model; it was made for another one.
        LoraError: tensors that do not fit together, or the model.
        CheckpointError: no safetensors file, or a damaged one.
    """
    path = Path(path)
    header = read_header(path)
    file = TensorFile(header)
    sources: dict[str, Source] = {key: file.source(key) for key in header.tensors}
    return lora_of(sources, checkpoint, name or path.stem, header.metadata, where=str(path))


def lora_of_state(state: Mapping[str, Tensor], checkpoint: Checkpoint, name: str, metadata: Mapping[str, str]) -> Lora:
    """The LoRA in a state dict in memory; see `read_lora`."""
    held: dict[str, Source] = {key: HeldTensor(tensor) for key, tensor in state.items()}
    return lora_of(held, checkpoint, name, metadata, where=name)


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
        found = _split(key)
        if found is None:
            unmatched.append(key)
        else:
            stem, algorithm, role = found
            modules[stem][algorithm][role] = key
    scaling = _peft_scaling(metadata)
    patches: list[Patch] = []
    for stem, groups in modules.items():
        rows, keys = names.module(stem), [k for g in groups.values() for k in g.values()]
        shared = groups.pop("any", {})
        bias = groups.pop("bias", {})
        if bias:
            bias_rows = names.bias(stem)
            if bias_rows is None:
                unmatched += bias.values()
            else:
                patches.append(Patch("diff", bias_rows, {"diff": sources[bias["diff"]]}))
        if rows is None:
            unmatched += [k for k in keys if k not in bias.values()]
            continue
        if not groups:
            unmatched += shared.values()
        alpha = _number(sources[shared["alpha"]], shared["alpha"]) if "alpha" in shared else None
        for algorithm, roles in groups.items():
            tensors = {role: sources[key] for role, key in roles.items()}
            patches.append(_patch(algorithm, rows, tensors, shared, sources, alpha, scaling, stem))
    if not patches:
        raise LoraUnmatched(_why_nothing(where, unmatched, spec.family), hint=f"a LoRA for {spec.variant}")
    try:
        return Lora.of(name, spec, patches, unmatched=tuple(sorted(unmatched)), metadata=dict(metadata))
    except LoraError as error:
        raise type(error)(f"{where}: {error.message}", hint=error.hint) from error


def names_of(checkpoint: Checkpoint) -> ParameterNames:
    """The names of the model's parameters; made once per spec object."""
    known = checkpoint.spec.__dict__.get("_lora_names")
    if known is None:
        known = ParameterNames(checkpoint.adapter, checkpoint.spec)
        # A frozen dataclass has a plain dict, which `cached_property` uses in the same way.
        checkpoint.spec.__dict__["_lora_names"] = known
    return cast(ParameterNames, known)


def _split(key: str) -> tuple[str, str, str] | None:
    """Stem, algorithm and role of a key; None for an ending that nobody knows."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    index = next(i for i in range(len(_ENDINGS)) if match[f"k{i}"] is not None)
    _, algorithm, role = _ENDINGS[index]
    if not role:
        inner = re.fullmatch(_ENDINGS[index][0], match[f"k{index}"])
        assert inner is not None
        role = inner[1]
    return match["stem"], algorithm, role


def _patch(
    algorithm: str,
    rows: tuple[Rows, ...],
    tensors: dict[str, Source],
    shared: Mapping[str, str],
    sources: Mapping[str, Source],
    alpha: float | None,
    scaling: Callable[[str, int], float | None],
    stem: str,
) -> Patch:
    if algorithm == "oft" and len(tensors["blocks"].shape if "blocks" in tensors else ()) == 4:
        algorithm = "boft"
    if "dora_scale" in shared and algorithm not in ("diff", "set"):
        tensors["dora_scale"] = sources[shared["dora_scale"]]
    if algorithm == "lora" and alpha is None and "down" in tensors and tensors["down"].shape:
        alpha = scaling(stem, tensors["down"].shape[0])
    return Patch(algorithm, rows, tensors, alpha if algorithm not in ("diff", "set") else None)


def _number(source: Source, key: str) -> float:
    if source.nbytes > _LARGEST_ALPHA or len(source.shape) > 1 or (source.shape and source.shape[0] != 1):
        raise LoraError(f"{key} is no single number.", hint="another copy of the file")
    value = float(source.load().to(torch.float64).reshape(()).item())
    if value != value or value in (float("inf"), float("-inf")):
        raise LoraError(f"{key} is {value}.", hint="another copy of the file")
    return value


def _peft_scaling(metadata: Mapping[str, str]) -> Callable[[str, int], float | None]:
    """Alpha by module stem and rank, as the PEFT configuration that diffusers stores beside the tensors says."""
    try:
        stored = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        stored = {}
    config: dict[str, Any] = {}
    if isinstance(stored, dict):
        config = {k.removeprefix("transformer."): v for k, v in stored.items() if not k.startswith("text_encoder")}
    base, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(base, (int, float)) or not isinstance(patterns, dict):
        return lambda stem, rank: None

    def alpha(stem: str, rank: int) -> float | None:
        value: Any = base
        for pattern, other in patterns.items():
            # Patterns are module names or their ends; PEFT allows expressions, which trainers do not write.
            if stem == pattern or stem.endswith(f".{pattern}"):
                value = other
        if not isinstance(value, (int, float)):
            return None
        return float(value) * sqrt(rank) if config.get("use_rslora") else float(value)

    return alpha


def _why_nothing(where: str, unmatched: list[str], family: str) -> str:
    if not unmatched:
        return f"{where} holds no LoRA."
    shown = ", ".join(sorted(unmatched)[:3])
    return (
        f"None of the {len(unmatched)} keys of {where} names a parameter of this {family} model, for example {shown}."
    )
