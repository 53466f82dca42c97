"""LoRAs that diffusers loaded with PEFT: off a whole transformer before it is split, and on again afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from mesh_core.errors import PlanError
from mesh_core.model.library import Checkpoint
from mesh_core.programs.peft import PREFIX, PeftLora, PeftLoras


@dataclass(frozen=True)
class UnloadedLora:
    """A LoRA that was unloaded, and what it takes to load it again. ``weight``: None if it was not active."""

    name: str
    state: dict[str, Tensor]
    options: dict[str, Any]
    weight: float | None


def take_off(pipeline: Any) -> list[UnloadedLora]:
    """Unload the LoRAs of a whole pipeline's transformer; those of its other parts stay.

    Raises:
        PlanError: some are fused: they cannot be told from the model.
    """
    model = pipeline.transformer
    if not getattr(model, "peft_config", None):
        return []
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    if any(layer.merged_adapters for layer in layers):
        raise PlanError("A pipeline with fused LoRAs cannot be split.", hint="pipe.unfuse_lora() first")
    active = list(layers[0].active_adapters) if layers else []
    taken = []
    for name, config in model.peft_config.items():
        state = get_peft_model_state_dict(model, adapter_name=name)
        options = {"metadata": _plain(config.to_dict()), "prefix": PREFIX}
        layer = next((x for x in layers if name in getattr(x, "scaling", {})), None)
        weight = _weight(layer, name) if layer is not None else 1.0
        named = {f"{PREFIX}.{k}": v for k, v in state.items()}
        taken.append(UnloadedLora(name, named, options, weight if name in active else None))
    model.unload_lora()
    return taken


def put_back(pipeline: Any, taken: Sequence[UnloadedLora]) -> None:
    """Undo `take_off`: load them again, with the strengths that they had."""
    model = pipeline.transformer
    for lora in taken:
        model.load_lora_adapter(dict(lora.state), adapter_name=lora.name, **lora.options)
    active = {a.name: a.weight for a in taken if a.weight is not None}
    if active:
        model.set_adapters(list(active), list(active.values()))


def loras_of(taken: Sequence[UnloadedLora], checkpoint: Checkpoint) -> PeftLoras:
    """The list that a split model has of what `take_off` unloaded.

    Raises:
        LoraError: one cannot be used on a split model.
    """
    loras = PeftLoras(checkpoint)
    for lora in taken:
        loras.load(lora.state, lora.name, lora.options, hotswap=False)
        loras.loaded[lora.name].weight = 1.0 if lora.weight is None else lora.weight
    loras.active = [a.name for a in taken if a.weight is not None]
    return loras


def _weight(layer: Any, name: str) -> float:
    """The strength that was set, from the product of it and of alpha / rank that PEFT keeps."""
    alpha, rank = layer.lora_alpha[name], layer.r[name]
    return float(layer.scaling[name] * rank / alpha)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    kept = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_modules", "lora_bias")
    return {f"{PREFIX}.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items() if k in kept}


def put_on_again(model: nn.Module, loras: PeftLoras) -> None:
    """Load into a whole model, with diffusers' own calls, what it had while it was split."""
    target = cast(Any, model)

    def load(name: str, lora: PeftLora) -> None:
        options = {k: v for k, v in lora.options.items() if k != "prefix"}
        target.load_lora_adapter(lora.state, prefix=lora.options.get("prefix", PREFIX), adapter_name=name, **options)

    for i, (lora, strength) in enumerate(loras.kept):
        load(f"kept_{i}", lora)
        target.set_adapters(f"kept_{i}", strength)
        target.fuse_lora()
        target.unload_lora()
    for name, lora in loras.loaded.items():
        load(name, lora)
    if loras.active:
        target.set_adapters(loras.active, [loras.loaded[n].weight for n in loras.active])
    if loras.fused:
        target.fuse_lora(adapter_names=[name for name, _ in loras.fused])
    if not loras.on:
        target.disable_lora()
