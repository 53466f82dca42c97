"""How ComfyUI computes with the quantised weights of a model, for workers to do the same.

Its quantised layers make numbers of a weight, or quantise their inputs and multiply: each layer says which. Its
library, comfy-kitchen, rounds otherwise where its CUDA kernels run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import comfy.ops
import torch

from mesh_core.errors import CheckpointUnrecognised
from mesh_core.model.library import Checkpoint
from mesh_core.model.numerics import ON_NUMBERS, Numerics, usual_numerics, with_loras
from mesh_core.model.stored import WeightFormat, format_of

_CUDA = "kitchen-cuda/"
"""How the names of arithmetics of comfy-kitchen's CUDA kernels begin; formats list them beside the plain ones."""


def numerics_of(
    checkpoint: Checkpoint, model: Any, dtype: torch.dtype, device: torch.device, formats: Mapping[str, WeightFormat]
) -> Numerics:
    """What ComfyUI's ``model``, a BaseModel that is ``checkpoint``, computes in.

    Raises:
        CheckpointUnrecognised: it computes with weights of some kind as no worker does.
    """
    usual = usual_numerics(checkpoint.spec, dtype, device, formats)
    multiplied = _multiplied(checkpoint, model)
    ways = {label: _way(label, layers, dtype, device, formats) for label, layers in multiplied.items()}
    # ComfyUI patches the numbers and quantises them anew; workers patch them for each step and do not round again.
    return replace(usual, arithmetic=with_loras(ways, ON_NUMBERS))


def _multiplied(checkpoint: Checkpoint, model: Any) -> dict[str, set[bool]]:
    """By label of a stored weight, whether layers with such weights quantise their inputs."""
    found: dict[str, set[bool]] = {}
    for parameter in checkpoint.spec.parameters.values():
        if parameter.in_a_format:
            for piece in parameter.pieces:
                layer = model.diffusion_model.get_submodule(piece.tensor.rpartition(".")[0])
                found.setdefault(parameter.dtype, set()).add(_multiplies(layer))
    return found


def _multiplies(layer: Any) -> bool:
    if isinstance(layer, comfy.ops.fp8_ops.Linear):
        return True
    return getattr(layer, "layout_type", None) is not None and not getattr(layer, "_full_precision_mm", True)


def _way(
    label: str, multiplied: set[bool], dtype: torch.dtype, device: torch.device, formats: Mapping[str, WeightFormat]
) -> str:
    format, kind = format_of(label, formats)
    multiplies = True in multiplied
    ways = [way for way in format.arithmetics(kind, dtype, device) if ("-mm" in way) == multiplies]
    if not ways or len(multiplied) > 1:
        raise CheckpointUnrecognised(
            f"ComfyUI multiplies with weights stored as {label} without making numbers of them; workers do not do that "
            f"in {dtype} on {device}.",
            hint="a bfloat16 or fp8 file of this model, and the loader's weight_dtype 'default'",
        )
    cuda = device.type == "cuda" and _cuda_kernels()
    return next((way for way in ways if way.startswith(_CUDA) == cuda), ways[0])


def _cuda_kernels() -> bool:
    try:
        import comfy_kitchen
    except ImportError:
        return False
    cuda = comfy_kitchen.list_backends().get("cuda", {})
    return bool(cuda.get("available")) and not cuda.get("disabled")
