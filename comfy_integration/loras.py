"""LoRAs in the graph, for the blocks on workers: what ComfyUI's patcher holds for them when sampling starts.

The patcher holds the weights of a LoRA as patches of tensors, wherever in the graph its loader was, so that is what is
read; blocks that run here get them from ComfyUI itself. LoRAs that only the workers have are named by Mesh Remote LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mesh_core.errors import LoraMissing, UnsupportedInput
from mesh_core.host.loras import AnyLora, Borrowed
from mesh_core.loras.lora import Applied
from mesh_core.loras.memory import NamedPatch, from_comfy_weights, lora_from_patches

from .cut import ModelCut

REMOTE = "mesh_remote_loras"
"""The attachment of a patcher that lists LoRAs of the workers."""


@dataclass(frozen=True)
class RemoteLora:
    """A LoRA by its name in a worker's listing."""

    name: str
    strength: float


class RemoteLoras(tuple):  # type: ignore[type-arg]
    """Those of a patcher, in their order; clones of the patcher share them."""

    def on_model_patcher_clone(self) -> RemoteLoras:
        """ComfyUI asks every attachment for what a clone gets."""
        return self


def add_remote(patcher: Any, name: str, strength: float) -> Any:
    """A clone of ``patcher`` with a LoRA of the worker's library; as any other LoRA when the file is here as well."""
    import folder_paths

    result = patcher.clone()
    path = folder_paths.get_full_path("loras", name)
    if path is not None:
        import comfy.sd
        import comfy.utils

        return comfy.sd.load_lora_for_models(result, None, comfy.utils.load_torch_file(path), strength, 0.0)[0]
    before: RemoteLoras = result.get_attachment(REMOTE) or RemoteLoras()
    result.set_attachments(REMOTE, RemoteLoras((*before, RemoteLora(name, strength))))
    return result


def loras_for_workers(patcher: Any, cut: ModelCut) -> list[AnyLora]:
    """What ``patcher`` holds for the blocks behind ``cut``; the same list while that does not change.

    Raises:
        UnsupportedInput: something that cannot be carried; named.
        LoraMissing: one that only workers have is wanted, and blocks run here.
    """
    remote: RemoteLoras = patcher.get_attachment(REMOTE) or RemoteLoras()
    if remote and cut.local:
        names = ", ".join(lora.name for lora in remote)
        raise LoraMissing(
            f"Only workers have {names}, and {cut.local} blocks run here: those would be drawn without it.",
            hint="local_blocks 0, or the same file in models/loras here",
        )
    return [*_in_graph(patcher, cut), *(Borrowed(lora.name, lora.strength) for lora in remote)]


def _in_graph(patcher: Any, cut: ModelCut) -> Iterator[Applied]:
    """One LoRA per loader node, so that a changed strength or another LoRA beside it sends nothing again.

    Several when one would change the order of what happens to a weight: not all algorithms add up.
    """
    groups: list[tuple[tuple[object, float, float], list[NamedPatch]]] = []
    for key, entries in patcher.patches.items():
        if key not in cut.remote_names:
            continue
        earliest = 0
        for strength, value, strength_model, offset, function in entries:
            if function is not None:
                raise UnsupportedInput(
                    f"A patch of {key} that is computed by another node cannot cross a cut.",
                    hint="all blocks local, or the workflow without that node",
                )
            patch = _patch(key, value, offset)
            kind = (_loader(value), float(strength), float(strength_model))
            earliest = next((i for i in range(earliest, len(groups)) if groups[i][0] == kind), len(groups))
            if earliest == len(groups):
                groups.append((kind, []))
            groups[earliest][1].append(patch)
    for number, ((_, strength, strength_model), patches) in enumerate(groups, 1):
        name = f"LoRA {number} of the workflow ({len(patches)} weights of remote blocks)"
        yield Applied(lora_from_patches(cut.checkpoint, patches, name), strength, strength_model)


def _patch(key: str, value: Any, offset: Any) -> NamedPatch:
    """ComfyUI's patch of the weight ``key`` in the core's form; refuses what ComfyUI itself cannot apply."""
    algorithm, weights = _algorithm_and_weights(key, value)
    tensors, alpha = from_comfy_weights(algorithm, weights)
    left_out = "a BOFT LoRA without alpha" if algorithm == "boft" and alpha is None else ""
    if algorithm == "lokr" and tensors.get("t2") is not None:
        left_out = "a LoKr LoRA with a Tucker core"
    if left_out:
        raise UnsupportedInput(
            f"ComfyUI cannot apply {left_out} ({key}): it would change remote blocks only.",
            hint="the workflow without that LoRA",
        )
    return NamedPatch(key, algorithm, tensors, alpha, offset)


def _loader(value: Any) -> object:
    """What the patches of one loader node have in common: ComfyUI gives them one set of the keys that it found."""
    return id(value.loaded_keys) if hasattr(value, "loaded_keys") else None


def _algorithm_and_weights(key: str, value: Any) -> tuple[str, Sequence[Any]]:
    if hasattr(value, "weights") and hasattr(value, "name"):
        return value.name, value.weights
    if isinstance(value, tuple) and len(value) == 1:
        return "diff", value
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        return value[0], value[1]
    raise UnsupportedInput(
        f"A merge of whole models changes {key}, which runs on a worker.",
        hint="save the merged model and load that on all machines, or all blocks local",
    )
