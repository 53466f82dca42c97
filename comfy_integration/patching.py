"""ComfyUI's patcher over another model, and the marks that this pack leaves on one. Knows no mesh."""

from __future__ import annotations

from typing import Any

import comfy.model_management

from .partial_model import nbytes

KEY = "mesh"
"""Under which wrappers and attachments of this pack are found."""


class SplitMark:
    """The attachment of a patcher whose model is split already; clones share it."""

    def on_model_patcher_clone(self) -> SplitMark:
        """ComfyUI asks every attachment for what a clone gets."""
        return self


def patcher_over(patcher: Any, model: Any) -> Any:
    """A clone of ``patcher`` over another model, with nothing loaded yet."""
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
    result.cached_hook_patches, result.current_hooks, result.is_injected = {}, None, False
    result.pinned = set()
    result.weight_inplace_update = False
    return result


def sampling_patcher(model: Any) -> Any:
    """The patcher that samples ``model`` now."""
    return model.current_patcher


def raise_if_interrupted() -> None:
    """Raises what ComfyUI raises when the user stopped the run."""
    comfy.model_management.throw_exception_if_processing_interrupted()
