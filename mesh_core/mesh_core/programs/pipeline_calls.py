"""Calls of a diffusers pipeline that go through all its parts: refused before the first, if the split one would be."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mesh_core.errors import UnsupportedInput
from mesh_core.programs.split_model import SplitModel, model_of

PIECEWISE: dict[str, str] = {
    "enable_group_offload": "exclude_modules='transformer', or enable_model_cpu_offload()",
    "enable_sequential_cpu_offload": "enable_model_cpu_offload(), or fewer blocks here: split(local=...)",
}
"""Methods that would offload the transformer piece by piece, and what to do instead."""

_WRAPPER = "_mesh_wrapper"


def guard(pipeline: Any) -> None:
    """Have the pipeline refuse what its transformer would, for as long as that is split."""
    for name in {*PIECEWISE, "to"} - vars(pipeline).keys():
        if hasattr(pipeline, name):
            setattr(pipeline, name, _guarded(weakref.ref(pipeline), name))


def unwrap(pipeline: Any) -> None:
    """Take the split transformer out of what torch.compile() made of it; that would compile it as one graph."""
    model = model_of(pipeline)
    if pipeline.transformer is not model:
        vars(model)[_WRAPPER] = pipeline.transformer
        pipeline.transformer = model


def wrap_again(pipeline: Any) -> None:
    """Undo `unwrap`."""
    wrapper = vars(model_of(pipeline)).pop(_WRAPPER, None)
    if wrapper is not None:
        pipeline.transformer = wrapper


def _guarded(pipeline: Callable[[], Any], name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(type(pipeline()), name))
    def call(*args: Any, **kwargs: Any) -> Any:
        this = pipeline()
        model = model_of(this)
        if isinstance(model, SplitModel):
            if name == "to":
                _refuse_another_type(model, [*args, *kwargs.values()])
            else:
                _refuse_pieces(model, name, kwargs.get("exclude_modules") or ())
        return getattr(type(this), name)(this, *args, **kwargs)

    return call


def _refuse_another_type(model: SplitModel, arguments: Sequence[Any]) -> None:
    for dtype in arguments:
        if isinstance(dtype, torch.dtype):
            model.refuse_type(dtype)


def _refuse_pieces(model: SplitModel, name: str, excluded: str | Sequence[str]) -> None:
    excluded = [excluded] if isinstance(excluded, str) else excluded
    if model.mesh.plan.remote and "transformer" not in excluded:
        raise UnsupportedInput(
            f"{name}() moves a transformer piece by piece, and pieces of this one are on workers.", hint=PIECEWISE[name]
        )
