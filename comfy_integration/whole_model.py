"""A lost worker's blocks run here after all, when the whole model fits: ComfyUI loads it as it loads any model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.model_management
import torch

from mesh_core.errors import MeshError, PlanDoesNotFit
from mesh_core.model.sizes import span_bytes
from mesh_core.model.spans import BlockSpan
from mesh_core.model.spec import ModelSpec

from .partial_model import partial_copy
from .patching import KEY, patcher_over
from .weight_source import WeightSource

Forward = Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]
"""Takes the place of a wrapped forward pass: ComfyUI's executor, positional and named arguments."""


def refuse_if_too_large(spec: ModelSpec, device: Any, dtype: torch.dtype, cause: MeshError) -> None:
    """Does the whole model in ``dtype`` fit the memory of ``device``?

    Raises:
        PlanDoesNotFit: no; says with ``cause`` why that was wanted.
    """
    needed = span_bytes(spec, BlockSpan(0, spec.blocks), dtype.itemsize)
    room = comfy.model_management.get_total_memory(device)
    if needed > room:
        raise PlanDoesNotFit(
            f"{cause.message} The whole model needs {needed / 1e9:.1f} GB, this machine has {room / 1e9:.1f} GB.",
            hint="the worker again, or another one",
        ) from cause


def run_whole_here(source: WeightSource, current: Any) -> Forward:
    """A function that runs the whole of ``source``'s model here, with the patches of the patcher ``current``."""
    whole = patcher_over(current, partial_copy(current.model, source.weights(source.checkpoint.spec.blocks)))
    for kind in whole.wrappers.values():
        kind.pop(KEY, None)
    comfy.model_management.load_models_gpu([whole])

    def forward(executor: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if executor.class_obj is whole.model.diffusion_model:
            return executor(*args, **kwargs)
        return whole.model.diffusion_model(*args, **kwargs)

    return forward
