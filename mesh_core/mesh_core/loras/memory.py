"""LoRAs that another program has parsed already: patches by tensor name, as ComfyUI holds them. Imports no ComfyUI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mesh_core.errors import LoraUnmatched, UnsupportedInput
from mesh_core.loras.lora import Lora
from mesh_core.loras.patch import Patch
from mesh_core.loras.read import names_of
from mesh_core.loras.tensors import HeldTensor, Source
from mesh_core.model.library import Checkpoint

# Roles in the order of the ``weights`` of ComfyUI's weight adapters.
_COMFY: Mapping[str, tuple[str, ...]] = {
    "lora": ("up", "down", "alpha", "mid", "dora_scale", "reshape"),
    "loha": ("w1_a", "w1_b", "alpha", "w2_a", "w2_b", "t1", "t2", "dora_scale"),
    "lokr": ("w1", "w2", "alpha", "w1_a", "w1_b", "w2_a", "w2_b", "t2", "dora_scale"),
    "glora": ("a1", "a2", "b1", "b2", "alpha", "dora_scale"),
    "oft": ("blocks", "rescale", "alpha", "dora_scale"),
    "boft": ("blocks", "rescale", "alpha", "dora_scale"),
    "diff": ("diff", "options"),
    "set": ("value",),
}


@dataclass(frozen=True)
class NamedPatch:
    """One patch of one tensor.

    Attributes:
        tensor: its whole name in any layout of the family, with or without a prefix such as ``diffusion_model.``.
        algorithm, tensors, alpha: see `mesh_core.loras.patch.Patch`; roles whose value is None count as left out.
        offset: (dim, start, size) of the part of the tensor that is patched; None for all of it.
    """

    tensor: str
    algorithm: str
    tensors: Mapping[str, Tensor | None]
    alpha: float | None = None
    offset: tuple[int, int, int] | None = None


def lora_from_patches(checkpoint: Checkpoint, patches: Sequence[NamedPatch], name: str) -> Lora:
    """The canonical form of ``patches``. Tensors are kept as they are and must not change afterwards.

    Raises:
        LoraUnmatched: a tensor that the model does not have.
        LoraError: tensors that do not fit the algorithm, or the weight.
    """
    names, made = names_of(checkpoint), []
    for patch in patches:
        rows = names.tensor(patch.tensor)
        if rows is None:
            raise LoraUnmatched(
                f"{name} patches {patch.tensor[:200]}, which this {checkpoint.spec.family} model does not have.",
                hint=f"a LoRA for {checkpoint.spec.variant}",
            )
        tensors: dict[str, Source] = {r: HeldTensor(t) for r, t in patch.tensors.items() if t is not None}
        alpha = float(patch.alpha) if patch.alpha is not None else None
        offset = tuple(int(n) for n in patch.offset) if patch.offset is not None else None
        made.append(Patch(patch.algorithm, rows, tensors, alpha, offset))  # type: ignore[arg-type]
    return Lora.of(name, checkpoint.spec, made)


def from_comfy_weights(algorithm: str, weights: Sequence[Any]) -> tuple[dict[str, Tensor | None], float | None]:
    """Tensors by role and alpha, from the ``weights`` of ComfyUI's weight adapter of that name, or from the value of
    a ``diff`` or ``set`` patch.

    Raises:
        UnsupportedInput: an algorithm, or a way to use it, that cannot cross a cut; named.
    """
    roles = _COMFY.get(algorithm)
    if roles is None or len(weights) > len(roles):
        raise UnsupportedInput(f"A ComfyUI patch of kind {algorithm!r} cannot cross a cut.", hint="bake it into a file")
    named = dict(zip(roles, weights, strict=False))
    alpha = named.pop("alpha", None)
    for extra in ("reshape", "options"):
        value = named.pop(extra, None)
        if value is not None and not (isinstance(value, Mapping) and not value.get("pad_weight")):
            raise UnsupportedInput(
                f"A ComfyUI patch ({algorithm}) that changes a weight's shape cannot cross a cut.",
                hint="a LoRA that keeps the model's shapes",
            )
    return named, float(alpha) if alpha is not None else None
