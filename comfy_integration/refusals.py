"""What a workflow attaches to blocks that run on workers is carried there or refused here.

ComfyUI's patcher, its options and the conditionings are looked at before sampling starts; the options of every forward
pass again, since guidance functions and hooks put in theirs while sampling. Knows no network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mesh_core.errors import UnsupportedInput
from mesh_core.programs.comfy import ComfySide

from .cut import ModelCut
from .partial_model import ROOT

_HINT = "all blocks local (local_blocks = number of blocks), or the workflow without it"


def refuse_what_cannot_cross(
    patcher: Any, options: Mapping[str, Any], conditionings: Iterable[Mapping[str, Any]], cut: ModelCut
) -> None:
    """Refuse what would be lost at ``cut``.

    Raises:
        UnsupportedInput: names it and says what to do.
    """
    passes = options.get("transformer_options", {})
    in_blocks = list(_block_patches(passes, cut))
    others = [
        *_on_weights(patcher, cut.remote_names),
        *_on_modules(patcher),
        *_in_conditionings(conditionings, cut.side),
    ]
    _refuse([*in_blocks, *others], cut, _HINT if others else _hint(passes, cut))


def refuse_options(options: Mapping[str, Any], cut: ModelCut) -> None:
    """Refuse what one forward pass's ``transformer_options`` hold for blocks that are not here.

    Raises:
        UnsupportedInput: names it and says what to do.
    """
    found = list(_block_patches(options, cut))
    if found:
        _refuse(found, cut, _hint(options, cut))


def _refuse(found: Sequence[str], cut: ModelCut, hint: str) -> None:
    if found:
        listed = "; ".join(dict.fromkeys(found))
        raise UnsupportedInput(
            f"Blocks {cut.local} and later run on a worker, where this would be lost: {listed}.", hint=hint
        )


def _hint(options: Mapping[str, Any], cut: ModelCut) -> str:
    """How many blocks have to be here, if that is all."""
    keys = [cut.side.block_key(cut.spec, block) for block in range(cut.spec.blocks)]
    replaced = [tuple(key) for by_block in options.get("patches_replace", {}).values() for key in by_block]
    last = max((keys.index(key) for key in replaced if key in keys), default=None)
    if last is None or any(_block_patches(options, replace(cut, local=last + 1))):
        return _HINT
    return f"local_blocks {last + 1} or more, or the workflow without it"


def _block_patches(options: Mapping[str, Any], cut: ModelCut) -> Iterator[str]:
    local = {cut.side.block_key(cut.spec, block) for block in range(cut.local)}
    for kind, by_block in options.get("patches_replace", {}).items():
        for key in by_block:
            if kind != "dit" or tuple(key) not in local:
                yield f"a replacement of {kind} {' '.join(str(part) for part in key)} (patches_replace)"
    for kind, patches in options.get("patches", {}).items():
        if patches and (kind not in cut.side.patches or cut.local == 0):
            yield f"a block patch of kind {kind!r}"
    if "optimized_attention_override" in options:
        yield "a replaced attention function (optimized_attention_override)"


def _on_weights(patcher: Any, remote: frozenset[str]) -> Iterator[str]:
    for patches in patcher.hook_patches.values():
        touched = [key for key in patches if key in remote]
        if touched:
            yield f"a LoRA or model hook on {len(touched)} weights of remote blocks"
    for name in patcher.weight_wrapper_patches:
        if name in remote:
            yield f"a weight wrapper on {name.removeprefix(ROOT)}"
    for name in patcher.object_patches:
        if name == ROOT[:-1] or name.startswith(ROOT):
            yield f"a replaced part of the model ({name})"


def _on_modules(patcher: Any) -> Iterator[str]:
    for name in patcher.injections:
        yield f"an injection into the model ({name})"
    if patcher.get_additional_models_with_key("multigpu"):
        yield "its copies on other GPUs (MultiGPU CFG Split)"


def _in_conditionings(conditionings: Iterable[Mapping[str, Any]], side: ComfySide) -> Iterator[str]:
    for conditioning in conditionings:
        control = conditioning.get("control")
        while control is not None:
            yield f"a ControlNet ({type(control).__name__})"
            control = getattr(control, "previous_controlnet", None)
        if conditioning.get("gligen") is not None:
            yield "GLIGEN boxes"
        for name, why in side.refused.items():
            if conditioning.get(name) is not None:
                yield f"{name} in a conditioning ({why})"
