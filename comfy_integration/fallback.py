"""A lost worker's blocks run here after all, when the whole model fits: ComfyUI loads it as it loads any model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import comfy.model_management

from mesh_core.errors import MeshError, PlanDoesNotFit

from .shadow import shadow
from .status import State

if TYPE_CHECKING:
    from .split import Split

log = logging.getLogger(__name__)

Forward = Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]


def whole_model(split: Split, current: Any, cause: MeshError) -> Forward:
    """A function that runs the whole of ``split``'s model here, with the patches of ``current``.

    Raises:
        PlanDoesNotFit: it does not fit this machine's memory; says why it was wanted.
    """
    from mesh_core.model.sizes import span_bytes
    from mesh_core.model.spans import BlockSpan

    from .split import KEY, on_model

    everything = BlockSpan(0, split.spec.blocks)
    needed = span_bytes(split.spec, everything, split.session.options.dtype.itemsize)
    device = current.load_device
    room = comfy.model_management.get_total_memory(device)
    if needed > room:
        raise PlanDoesNotFit(
            f"{cause.message} The whole model needs {needed / 1e9:.1f} GB, this machine has {room / 1e9:.1f} GB.",
            hint="the worker again, or another one",
        ) from cause
    log.warning("%s The model runs here from now on.", cause.message)
    split.hub.status.change(split.node, State.LOCAL, f"{cause.message} All blocks run here.")
    whole = on_model(current, shadow(current.model, split.source.weights(everything)))
    for kind in whole.wrappers.values():
        kind.pop(KEY, None)
    comfy.model_management.load_models_gpu([whole])

    def forward(executor: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if executor.class_obj is whole.model.diffusion_model:
            return executor(*args, **kwargs)
        return whole.model.diffusion_model(*args, **kwargs)

    return forward
