"""A model of which only some weights are here, in a shape that ComfyUI's memory management keeps right.

The copy has the module tree of ComfyUI's model, and parameters of its own over the same memory, so that ComfyUI moves
and patches it without touching the model it was made from. Modules whose weights are elsewhere stay in the tree with
parameters on the meta device: their names are what LoRAs are matched by. ComfyUI does not see them when it loads,
unloads or measures, and they cannot run. Knows no mesh and no model family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

ROOT = "diffusion_model."
"""The transformer in ComfyUI's model. It is never elsewhere as a whole: its forward is where the mesh takes over."""

Weights = Callable[[str], Tensor | None]
"""The data of a parameter by its full name; None when it is elsewhere."""

_STATE = frozenset(
    {
        "current_patcher",
        "model_loaded_weight_memory",
        "lowvram_patch_counter",
        "model_lowvram",
        "current_weight_patches_uuid",
        "model_offload_buffer_memory",
        "comfy_patched_weights",
        "dynamic_vbars",
        "dynamic_pins",
    }
)
_STATE_LIKE = re.compile(r"_v|_v_.*|_pin|_pin_.*|_prefetch|.*_lowvram_function")
"""What ComfyUI notes on modules about being loaded: not true of a copy. With dynamic VRAM it names pages of the GPU and
pinned memory that belong to the module it is on."""
_EMPTY: Mapping[str, Callable[[], Any]] = {
    "weight_function": list,
    "bias_function": list,
    "_resident_bank": lambda: None,
}
"""What every module has, as it is before anything is loaded."""


class Elsewhere(nn.Module):
    """Mixed into the class of a module whose weights are on another machine."""

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Iterator[Any]:
        return iter(())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Elsewhere:
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("This block runs on another machine; its weights are not here.")


def partial_copy(model: nn.Module, weights: Weights, prefix: str = "") -> nn.Module:
    """A copy of ``model`` with the weights that ``weights`` gives, and the others elsewhere."""
    copy = _copy(model, weights, prefix)
    if prefix == "":
        copy.__dict__["current_patcher"] = None
    return copy


def nbytes(model: nn.Module) -> int:
    """Bytes of the weights that are here."""
    return sum(t.nbytes for t in model.state_dict().values() if not t.is_meta)


def _copy(module: nn.Module, weights: Weights, prefix: str) -> nn.Module:
    own = _own_class(module)
    copy = own.__new__(own)
    copy.__dict__.update({name: _own(value) for name, value in module.__dict__.items() if not _is_state(name)})
    if "prev_comfy_cast_weights" in copy.__dict__:
        copy.__dict__["comfy_cast_weights"] = copy.__dict__.pop("prev_comfy_cast_weights")
    copy.__dict__.update({name: empty() for name, empty in _EMPTY.items() if name in copy.__dict__})
    here = elsewhere = 0
    parameters: dict[str, Any] = {}
    for name, parameter in module._parameters.items():
        data = weights(prefix + name) if parameter is not None else None
        if parameter is not None:
            here, elsewhere = here + (data is not None), elsewhere + (data is None)
            # A plain tensor, whatever class a quantised one has.
            none = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            parameters[name] = nn.Parameter(none if data is None else data, requires_grad=False)
        else:
            parameters[name] = None
    copy.__dict__["_parameters"] = parameters
    copy.__dict__["_buffers"] = {name: None if b is None else b.detach().clone() for name, b in module._buffers.items()}
    copy.__dict__["_modules"] = {
        name: None if child is None else _copy(child, weights, f"{prefix}{name}.")
        for name, child in module._modules.items()
    }
    children = [child for child in copy._modules.values() if child is not None]
    away = [child for child in children if isinstance(child, Elsewhere)]
    empty = [child for child in children if not child.state_dict(keep_vars=True)]
    inside = prefix not in ("", ROOT)
    if inside and not here and (elsewhere or away) and len(away) + len(empty) == len(children):
        copy.__class__ = _elsewhere_class(own)
    elif here and elsewhere:
        raise RuntimeError(f"{prefix}: some weights of one layer are here and some are not.")
    return copy


def _is_state(name: str) -> bool:
    return name in _STATE or _STATE_LIKE.fullmatch(name) is not None


def _own(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set)) else value


def _own_class(module: nn.Module) -> type[nn.Module]:
    cls = type(module)
    return cls.__mro__[2] if isinstance(module, Elsewhere) else cls


@cache
def _elsewhere_class(own: type[nn.Module]) -> type[nn.Module]:
    return type(own.__name__, (Elsewhere, own), {"__module__": own.__module__})
