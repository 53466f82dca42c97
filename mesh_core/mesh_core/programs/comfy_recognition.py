"""Which family a model that ComfyUI holds is of, and that family's side of ComfyUI.

The family is found through the model's own tensors, its side through `ModelAdapter.hosts`: no node is any family's own.
"""

from __future__ import annotations

from importlib import import_module

from torch import nn

from mesh_core.errors import CheckpointUnrecognised, PluginNotFound
from mesh_core.model.adapter import ModelAdapter
from mesh_core.model.claims import with_stored_weights
from mesh_core.model.library import Checkpoint, recognise
from mesh_core.plugins.registry import Plugins
from mesh_core.programs.comfy import ComfySide, header_of
from mesh_core.system.logs import logger

log = logger(__name__)

_HOST = "comfy"
"""The key of ComfyUI in `ModelAdapter.hosts`."""


def recognise_module(model: nn.Module, plugins: Plugins) -> tuple[Checkpoint, ComfySide]:
    """The checkpoint that ComfyUI's ``diffusion_model`` is, and its family's side of ComfyUI.

    Raises:
        CheckpointUnrecognised: no adapter knows it, or its weights are in a form that none computes with.
        PluginNotFound: the adapter does not know ComfyUI.
    """
    try:
        checkpoint = recognise(header_of(model), plugins)
    except CheckpointUnrecognised:
        # Names and shapes alone do not say it; a family may know more of its own models.
        for adapter in plugins.adapters().values():
            found = _recognised_by(adapter, model, plugins)
            if found is not None:
                return found
        raise
    return checkpoint, side_of(checkpoint.adapter)


def _recognised_by(adapter: ModelAdapter, model: nn.Module, plugins: Plugins) -> tuple[Checkpoint, ComfySide] | None:
    if _HOST not in adapter.hosts:
        return None
    try:
        side = side_of(adapter)
        header = with_stored_weights(side.header(model), plugins.weight_formats().values())
        spec = adapter.recognise(header)
    except ImportError as error:
        log.debug("%s is not asked, its side does not load in this ComfyUI: %s", adapter.family, error)
        return None
    except CheckpointUnrecognised as error:
        log.debug("%s: %s", adapter.family, error)
        return None
    return None if spec is None else (Checkpoint(header, spec, adapter), side)


def side_of(adapter: ModelAdapter) -> ComfySide:
    """The ComfyUI side of a family.

    Raises:
        PluginNotFound: the family has none.
    """
    target = adapter.hosts.get(_HOST)
    if target is None:
        raise PluginNotFound(
            f"The adapter for {adapter.family} does not know ComfyUI.", hint="a newer version of that adapter"
        )
    module, _, name = target.partition(":")
    side: ComfySide = getattr(import_module(module), name)(adapter)
    return side
