"""LoRAs of the script host: from what a user writes to what a runner takes, and onto and off whole pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from mesh_core.errors import LoraMissing, PlanError
from mesh_core.host.loras import AnyLora, Borrowed
from mesh_core.loras.library import own_library
from mesh_core.loras.lora import Applied
from mesh_core.loras.read import read_lora, warn_of_unmatched
from mesh_core.model.library import Checkpoint
from mesh_core.programs.peft import PREFIX, Adapter, Adapters
from mesh_core.programs.split_model import SplitModel
from mesh_core.system.config import Settings

LoraChoice = str | Path | tuple[str | Path, float]
"""A file, the name of one of this machine's or the workers' LoRAs, or the start of its hash; with its strength."""


def chosen(loras: Sequence[LoraChoice], checkpoint: Checkpoint, settings: Settings, *, local: bool) -> list[AnyLora]:
    """What ``loras`` names.

    Args:
        local: whether blocks run on this machine, for which the LoRA must be here.

    Raises:
        LoraMissing: neither a file nor a name that this machine knows, and blocks run here.
        LoraError: see `read_lora`.
    """
    library = own_library(settings)
    found: list[AnyLora] = []
    for item in loras:
        source, strength = item if isinstance(item, tuple) else (item, 1.0)
        if Path(source).is_file():
            found.append(Applied(warn_of_unmatched(read_lora(source, checkpoint)), float(strength)))
            continue
        try:
            lora = library.named(str(source), checkpoint, checkpoint.spec.parameters)
            found.append(Applied(warn_of_unmatched(lora), float(strength)))
        except LoraMissing:
            if local:
                raise
            found.append(Borrowed(str(source), float(strength)))
    return found


def set_loras(pipeline: Any, loras: Sequence[LoraChoice]) -> Any:
    """Give a split pipeline exactly ``loras``, beside those that diffusers' own calls loaded. Returns the pipeline.

    A changed strength, order or set is merged anew on every machine, without loading the model again; a worker is
    sent only what it lacks.

    Raises:
        PlanError: the pipeline is not split.
        LoraError and its kinds: one cannot be read, sent or used; the pipeline has the LoRAs that it had.
    """
    model = pipeline.transformer
    if not isinstance(model, SplitModel):
        raise PlanError("This pipeline is not split.", hint="pipe.load_lora_weights(...), or mesh_core.split first")
    runner = model.mesh
    settings = runner.session.options.settings if runner.session is not None else Settings.load()
    given = tuple(chosen(loras, runner.checkpoint, settings, local=bool(len(runner.plan.local))))
    model._mesh_change(lambda adapters: setattr(adapters, "given", given))
    return pipeline


@dataclass(frozen=True)
class Taken:
    """A PEFT adapter that was unloaded, and what it takes to load it again. ``weight``: None if it was not active."""

    name: str
    state: dict[str, Tensor]
    options: dict[str, Any]
    weight: float | None


def take_off(pipeline: Any) -> list[Taken]:
    """Unload the PEFT adapters of a whole pipeline's transformer; those of its other parts stay.

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
        taken.append(Taken(name, named, options, weight if name in active else None))
    model.unload_lora()
    return taken


def put_back(pipeline: Any, taken: Sequence[Taken]) -> None:
    """Undo `take_off`."""
    model = pipeline.transformer
    for adapter in taken:
        model.load_lora_adapter(dict(adapter.state), adapter_name=adapter.name, **adapter.options)
    active = {a.name: a.weight for a in taken if a.weight is not None}
    if active:
        model.set_adapters(list(active), list(active.values()))


def adapters_of(taken: Sequence[Taken], checkpoint: Checkpoint) -> Adapters:
    """What a split model has instead."""
    adapters = Adapters(checkpoint)
    for adapter in taken:
        adapters.load(adapter.state, adapter.name, adapter.options, hotswap=False)
        adapters.loaded[adapter.name].weight = 1.0 if adapter.weight is None else adapter.weight
    adapters.active = [a.name for a in taken if a.weight is not None]
    return adapters


def _weight(layer: Any, name: str) -> float:
    """The strength that was set, from the product of it and of alpha / rank that PEFT keeps."""
    alpha, rank = layer.lora_alpha[name], layer.r[name]
    return float(layer.scaling[name] * rank / alpha)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    kept = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_modules", "lora_bias")
    return {f"{PREFIX}.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items() if k in kept}


def put_on(model: nn.Module, adapters: Adapters) -> None:
    """Load into a whole model, with diffusers' own calls, what it had while it was split."""
    target = cast(Any, model)

    def load(name: str, adapter: Adapter) -> None:
        options = {k: v for k, v in adapter.options.items() if k != "prefix"}
        target.load_lora_adapter(
            adapter.state, prefix=adapter.options.get("prefix", PREFIX), adapter_name=name, **options
        )

    for i, (adapter, strength) in enumerate(adapters.kept):
        load(f"kept_{i}", adapter)
        target.set_adapters(f"kept_{i}", strength)
        target.fuse_lora()
        target.unload_lora()
    for name, adapter in adapters.loaded.items():
        load(name, adapter)
    if adapters.active:
        target.set_adapters(adapters.active, [adapters.loaded[n].weight for n in adapters.active])
    if adapters.fused:
        target.fuse_lora(adapter_names=[name for name, _ in adapters.fused])
    if not adapters.on:
        target.disable_lora()
