"""LoRAs that diffusers loaded with PEFT: off a whole transformer before it is split, and on again afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mesh_core.errors import LoraUnmatched, PlanError, UnsupportedInput
from mesh_core.model.library import Checkpoint
from mesh_core.programs.peft import PeftLora, PeftLoras
from mesh_core.programs.peft_layers import LayerState, layers_of, put_on, set_states, states_of

_KINDS = ("LORA", "LOKR", "LOHA")
"""PEFT's names of those that change weights by tensors which can be sent."""


@dataclass(frozen=True)
class UnloadedLoras:
    """LoRAs that were unloaded, and what it takes to load them again: by name PEFT's configuration and the tensors,
    and what each layer was set to."""

    loras: Mapping[str, tuple[Any, dict[str, Tensor]]] = field(default_factory=dict)
    states: Mapping[str, LayerState] = field(default_factory=dict)


def take_off(pipeline: Any) -> UnloadedLoras:
    """Unload the LoRAs of a whole pipeline's transformer; those of its other parts stay.

    Raises:
        PlanError: some are fused: they cannot be told from the model.
        UnsupportedInput: a kind that cannot cross a cut.
    """
    model = pipeline.transformer
    if not getattr(model, "peft_config", None):
        return UnloadedLoras()
    for name, config in model.peft_config.items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind not in _KINDS:
            raise UnsupportedInput(
                f"{name}, of PEFT's kind {kind}, cannot cross a cut; {', '.join(_KINDS)} can.",
                hint=f"pipe.delete_adapters({name!r}) first",
            )
    from peft import get_peft_model_state_dict

    states = states_of(model)
    if any(state.merged for state in states.values()):
        raise PlanError("A pipeline with fused LoRAs cannot be split.", hint="pipe.unfuse_lora() first")
    with warnings.catch_warnings():
        # Biases have one dimension, which PEFT takes for a sign of damage.
        warnings.filterwarnings("ignore", ".*have invalid shape")
        loras = {n: (c, dict(get_peft_model_state_dict(model, adapter_name=n))) for n, c in model.peft_config.items()}
    model.unload_lora()
    if any(name.rpartition(".")[2] in ("to_qkv", "to_added_qkv") for name in states):
        model.unfuse_qkv_projections()
    return UnloadedLoras(loras, states)


def put_back(pipeline: Any, taken: UnloadedLoras) -> None:
    """Undo `take_off`."""
    for name, (config, state) in taken.loras.items():
        put_on(pipeline.transformer, name, config, state)
    set_states(pipeline.transformer, taken.states)


def loras_of(taken: UnloadedLoras, checkpoint: Checkpoint, model: nn.Module) -> PeftLoras:
    """The LoRAs that ``model`` has, once it is split, of what `take_off` unloaded.

    Raises:
        LoraError, UnsupportedInput: one cannot be used on a split model.
    """
    loras = PeftLoras(checkpoint)
    for name, (config, state) in taken.loras.items():
        lora = loras.read(state, name, {}, name)
        if lora.unmatched:
            raise LoraUnmatched(
                f"{name} changes what a split model cannot change: {lora.unmatched[0]}.",
                hint=f"pipe.delete_adapters({name!r}) first",
            )
        put_on(loras.model, name, config, state, bare=True)
        loras.take(name, lora)
    if taken.loras:
        set_states(loras.model, taken.states)
    return loras


def refuse_merging(loras: PeftLoras) -> None:
    """Raises:
    UnsupportedInput: a whole model would have LoRAs merged into weights that stay as they are stored.
    """
    parameters = loras.checkpoint.spec.parameters
    for where, entries in (*loras.merged.items(), *loras.kept.items()):
        name = f"{where}.weight"
        if entries and name in parameters and parameters[name].stored_bytes is not None:
            raise UnsupportedInput(
                f"On a whole model, fused LoRAs cannot be merged into {name}, which stays as it is stored.",
                hint="pipe.unfuse_lora() first, or the pipeline loaded anew",
            )


def put_on_again(model: Any, loras: PeftLoras) -> None:
    """Have PEFT load into a whole model what it had while it was split."""
    for where, entries in loras.merged.items():
        # What was deleted is nowhere to be merged from, later.
        gone = [(lora, strength) for lora, strength in entries if lora not in loras.loaded.values()]
        loras.kept.setdefault(where, []).extend(gone)
    _merge_for_good(model, loras)
    for name, lora in loras.loaded.items():
        put_on(model, name, lora.config, lora.state())
    names = {lora: name for name, lora in loras.loaded.items()}
    layers = layers_of(model)
    for where, entries in loras.merged.items():
        _merge(layers[where], where, [(names[lora], lora, strength) for lora, strength in entries if lora in names])
    set_states(model, states_of(loras.model) if loras.loaded else {})


def _merge_for_good(model: Any, loras: PeftLoras) -> None:
    everything = [(where, lora, strength) for where, entries in loras.kept.items() for lora, strength in entries]
    if not everything:
        return
    names = {lora: f"kept_{i}" for i, lora in enumerate(dict.fromkeys(lora for _, lora, _ in everything))}
    for lora, name in names.items():
        put_on(model, name, lora.config, lora.state())
    layers = layers_of(model)
    for where, lora, strength in everything:
        _merge(layers[where], where, [(names[lora], lora, strength)])
    model.unload_lora()


def _merge(layer: Any, where: str, entries: Sequence[tuple[str, PeftLora, float]]) -> None:
    for name, lora, strength in entries:
        layer.scaling[name] = strength * lora.scaling[where]
        layer.merge(adapter_names=[name])
