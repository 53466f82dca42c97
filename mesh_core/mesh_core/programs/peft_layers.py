"""PEFT's layers in a model: what they are set to, and putting LoRAs into them. Knows no split.

What diffusers calls an adapter is a LoRA here: an adapter is a model family.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mesh_core.errors import UnsupportedInput

_FUSED = ("to_qkv", "to_added_qkv")
"""Layers that diffusers makes of three when a LoRA is for them."""


@dataclass(frozen=True)
class LayerState:
    """What a PEFT layer is set to, by LoRA where it differs."""

    scaling: Mapping[str, float]
    active: tuple[str, ...]
    disabled: bool
    merged: tuple[str, ...]


def layers_of(model: Any) -> dict[str, Any]:
    """PEFT's layers by the name of the module in whose place they are."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def states_of(model: Any) -> dict[str, LayerState]:
    """What each layer is set to."""
    return {
        name: LayerState(
            {lora: float(scale) for lora, scale in layer.scaling.items()},
            tuple(layer.active_adapters),
            bool(layer.disable_adapters),
            tuple(layer.merged_adapters),
        )
        for name, layer in layers_of(model).items()
    }


def set_states(model: Any, states: Mapping[str, LayerState]) -> None:
    """Set the layers to ``states``; what is merged into weights is the caller's."""
    for name, layer in layers_of(model).items():
        state = states.get(name)
        if state is not None:
            layer.scaling.update({k: v for k, v in state.scaling.items() if k in layer.scaling})
            layer.set_adapter(list(state.active), inference_mode=True)
            layer.enable_adapters(not state.disabled)
            layer.requires_grad_(False)
            layer.merged_adapters = list(state.merged)


def put_on(model: Any, name: str, config: Any, state: Mapping[str, Tensor], *, bare: bool = False) -> None:
    """Have PEFT put a LoRA into ``model``, as the only active one.

    Args:
        config: of PEFT, for what kind of LoRA that is and which modules it is for.
        state: its tensors as PEFT names them, without the LoRA's name.
        bare: ``model`` is a skeleton.
    """
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    here = dict(model.named_modules())
    targets = {key.rsplit(".lokr_", 1)[0] for key in state}
    if any(t.rpartition(".")[2] in _FUSED and t not in here for t in targets):
        model.fuse_qkv_projections()
    shapes = {key: tensor.to("meta") for key, tensor in state.items()} if bare else dict(state)
    inject_adapter_in_model(copy.deepcopy(config), model, name, low_cpu_mem_usage=bare)
    set_peft_model_state_dict(model, shapes, name, low_cpu_mem_usage=bare)
    model.requires_grad_(False)
    model._hf_peft_config_loaded = True


def initial_scaling(layer: Any, name: str) -> float:
    """By what a layer multiplies the LoRA at strength 1."""
    alpha = (layer.lora_alpha if hasattr(layer, "lora_alpha") else layer.alpha)[name]
    rank = layer.r[name]
    return float(alpha / math.sqrt(rank) if getattr(layer, "use_rslora", {}).get(name) else alpha / rank)


def refuse_variants(layer: Any, where: str, name: str) -> None:
    """Raises:
    UnsupportedInput: the layer uses the LoRA in a way of its own, or for a bias that the layer does not have.
    """
    variant = type(getattr(layer, "lora_variant", {}).get(name)).__name__
    if variant not in ("NoneType", "DoraLinearVariant"):
        raise UnsupportedInput(f"{variant} of {where} cannot cross a cut.", hint="a plain LoRA, or one with DoRA")
    if getattr(layer, "lora_bias", {}).get(name) and layer.bias is None:
        raise UnsupportedInput(
            f"The LoRA {name} has a bias for {where}, which has none; a split model cannot add one.",
            hint="a LoRA without lora_bias",
        )
    if isinstance(layer.scaling[name], Tensor):
        raise UnsupportedInput(
            f"The LoRA {name} was prepared for swapping in a compiled model; a split model runs none.",
            hint="the pipeline loaded anew, without enable_lora_hotswap",
        )
