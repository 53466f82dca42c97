"""ComfyUI's patcher over another model, and the marks that this pack leaves on one. Knows no mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_patcher

from .partial_model import nbytes

KEY = "mesh"
"""Under which wrappers and attachments of this pack are found."""


class SplitMark:
    """The attachment of a patcher whose model is split already; clones share it."""

    def on_model_patcher_clone(self) -> SplitMark:
        """ComfyUI asks every attachment for what a clone gets."""
        return self


def patcher_over(patcher: Any, model: Any, again: Callable[[], Any] | None = None) -> Any:
    """A clone of ``patcher`` over another model, with nothing loaded yet.

    Args:
        again: makes another copy of ``model``, for when ComfyUI wants one that its dynamic memory does not manage.
    """
    original, size = patcher.model, patcher.size
    # The constructor, which a clone calls, notes on the model what is loaded: that has to be the new one.
    patcher.model, patcher.size = model, max(nbytes(model), 1)
    try:
        result = patcher.clone()
    finally:
        patcher.model, patcher.size = original, size
    model.device = result.offload_device
    result.parent = None
    result.backup, result.object_patches_backup, result.hook_backup = {}, {}, {}
    if hasattr(result, "backup_buffers"):
        result.backup_buffers = {}
    if hasattr(result, "cached_patcher_init"):
        # The original's would load the whole model.
        result.cached_patcher_init = None if again is None else (_loader(result, again), ())
    result.cached_hook_patches, result.current_hooks, result.is_injected = {}, None, False
    result.pinned = set()
    result.weight_inplace_update = False
    return result


def new_patcher(model: Any, load_device: Any, offload_device: Any) -> Any:
    """A patcher of the kind that this ComfyUI's own loaders make; its size is that of what is here of ``model``."""
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return _new(kind, model, load_device, offload_device)


def _loader(patcher: Any, again: Callable[[], Any]) -> Callable[..., Any]:
    load_device, offload_device, dynamic = patcher.load_device, patcher.offload_device, type(patcher)

    def load(disable_dynamic: bool = False) -> Any:
        kind = comfy.model_patcher.ModelPatcher if disable_dynamic else dynamic
        return _new(kind, again(), load_device, offload_device)

    return load


def _new(kind: Any, model: Any, load_device: Any, offload_device: Any) -> Any:
    model.device = offload_device
    return kind(model, load_device, offload_device, size=max(nbytes(model), 1))


def sampling_patcher(model: Any) -> Any:
    """The patcher that samples ``model`` now."""
    return model.current_patcher


def raise_if_interrupted() -> None:
    """Raises what ComfyUI raises when the user stopped the run."""
    comfy.model_management.throw_exception_if_processing_interrupted()
