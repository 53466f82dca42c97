"""What somebody did to a model before it was split, as far as workers would not do it: refused by name.

Workers compute with the model class as diffusers has it. Hooks, caches, other attention processors and other modules in
the place of its own would act on this machine's blocks only.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from mesh_core.errors import CheckpointUnrecognised, UnsupportedInput
from mesh_core.model.library import Checkpoint
from mesh_core.model.spans import BlockSpan
from mesh_core.programs.foreign_parts import UNSPLIT_HINT, parts_elsewhere, unmarked
from mesh_core.programs.held_weights import is_gguf_layer


def refuse_replaced_parts(model: nn.Module, checkpoint: Checkpoint, local: BlockSpan) -> None:
    """Refuse what acts on modules that workers are to compute.

    Raises:
        UnsupportedInput: a hook, a forward() or an attention processor that they do not have.
        CheckpointUnrecognised: another module in the place of one of theirs.
    """
    with torch.device("meta"):
        own = dict(checkpoint.adapter.skeleton(checkpoint.spec).named_modules())
    for name, (module, _) in parts_elsewhere(model, checkpoint.spec, local).items():
        expected = own.get(name)
        # A program's own layer for a format computes with the weight as workers do: that is what its arithmetic names.
        same = type(expected) is nn.Linear and is_gguf_layer(module)
        if not same and type(expected) is not unmarked(type(module)):
            raise CheckpointUnrecognised(
                f"{name} is a {type(module).__name__}, which no {type(own['']).__name__} has there: a part of the "
                "model was replaced, and workers would compute without it.",
                hint="the model as it was loaded, or all of it on this machine",
            )
        if what := _done_to(module, getattr(expected, "processor", None)):
            raise UnsupportedInput(
                f"{name} has {what}; workers would compute without it.", hint=f"take it off; {UNSPLIT_HINT}"
            )


def _done_to(module: nn.Module, processor: Any) -> str:
    """What was done to ``module`` that changes what it computes; empty if nothing was."""
    registry = module.__dict__.get("_diffusers_hook")
    if registry is not None and registry.hooks:
        return f"the diffusers hook {next(iter(registry.hooks))!r}"
    if _is_replaced(module, type(module).forward):
        return "a forward() of its own"
    if module._forward_hooks or module._forward_pre_hooks:
        return "a hook of PyTorch"
    mine = getattr(module, "processor", None)
    if type(mine) is not type(processor):
        return f"the attention processor {type(mine).__name__}"
    if getattr(mine, "_parallel_config", None) is not None:
        return "its attention spread over several devices"
    return ""


def _is_replaced(module: nn.Module, *own: Any) -> bool:
    """Whether calling ``module`` runs something else than one of ``own``; hooks that were removed leave a method."""
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) not in own


def refuse_replaced_forward(model: nn.Module) -> None:
    """Refuse a model whose forward() was replaced by what calls its earlier one, which knows no split.

    The hook of enable_model_cpu_offload() can be told to call another: see `redirect_forward`.

    Raises:
        UnsupportedInput: names what is there.
    """
    own, registry = type(model).forward, model.__dict__.get("_diffusers_hook")
    if registry is not None and registry.hooks:
        what, hint = f"the diffusers hook {next(iter(registry.hooks))!r}", f"take it off; {UNSPLIT_HINT}"
    elif not _is_replaced(model, own):
        return
    elif offloading_hook(model) is not None and _is_accelerates(model):
        if getattr(model._old_forward, "__func__", None) is own:
            return
        what, hint = "a hook of accelerate over another forward()", "take both off, and put them on after split()"
    elif "_hf_hook" in model.__dict__:
        kind = type(model._hf_hook).__name__
        what, hint = f"the hook {kind} of accelerate", "pipe.remove_all_hooks() first; enable_model_cpu_offload() works"
    else:
        what, hint = "another forward()", "replace forward() after split(), and call the one that it has then"
    raise UnsupportedInput(f"The transformer has {what}, which would run all of its blocks here.", hint=hint)


def offloading_hook(model: nn.Module) -> Any:
    """What enable_model_cpu_offload() put on ``model``; None if it did not."""
    hook = model.__dict__.get("_hf_hook")
    return hook if type(hook).__name__ == "CpuOffload" else None


def _is_accelerates(model: nn.Module) -> bool:
    return getattr(getattr(model.forward, "func", None), "__module__", "") == "accelerate.hooks"


def redirect_forward(model: nn.Module, old: Any, new: Any) -> None:
    """Have hooks that call ``old``, a function of the model's class until now, call ``new``, that of its next class."""
    if getattr(model.__dict__.get("_old_forward"), "__func__", None) is old:
        model._old_forward = MethodType(new, model)  # type: ignore[assignment]
    if getattr(model.__dict__.get("forward"), "__func__", None) is old:
        del model.__dict__["forward"]
