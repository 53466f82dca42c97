"""Calls of a diffusers pipeline that go through all its parts: refused before the first, if the split one would be."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from mesh_core.errors import UnsupportedInput
from mesh_core.programs.split_model import SplitModel, model_of

GUARDED: dict[str, str] = {
    "enable_group_offload": "exclude_modules='transformer', or enable_model_cpu_offload()",
    "enable_sequential_cpu_offload": "enable_model_cpu_offload(), or fewer blocks here: split(local=...)",
}
"""Methods that would offload the transformer piece by piece, and what to do instead."""


_WRAPPER = "_mesh_wrapper"


def guard(pipeline: Any) -> None:
    """Have the pipeline refuse `GUARDED` for as long as its transformer is split."""
    for name in GUARDED.keys() - vars(pipeline).keys():
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
        excluded = kwargs.get("exclude_modules") or ()
        excluded = [excluded] if isinstance(excluded, str) else excluded
        model = model_of(this)
        if isinstance(model, SplitModel) and model.mesh.plan.remote and "transformer" not in excluded:
            raise UnsupportedInput(
                f"{name}() moves a transformer piece by piece, and most of this one is on workers.", hint=GUARDED[name]
            )
        return getattr(type(this), name)(this, *args, **kwargs)

    return call
