"""The LoRAs of a split transformer, in the terms of diffusers and PEFT.

Diffusers has PEFT put layers into a model; of a split one only a part is here. So PEFT puts them into a skeleton of the
model without weights. Every call of diffusers is made on that, and its layers say which LoRA has which strength where.
What calls merge into weights, for the time being or for good, is kept here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mesh_core.errors import LoraError, LoraUnmatched, UnsupportedInput
from mesh_core.host.loras import AnyLora
from mesh_core.loras.lora import Applied, Lora
from mesh_core.loras.patch import Patch, canonical
from mesh_core.loras.read import lora_of_state, names_of, warn_of_unmatched
from mesh_core.model.library import Checkpoint
from mesh_core.programs.peft_layers import (
    LayerState,
    initial_scaling,
    layers_of,
    put_on,
    refuse_variants,
    set_states,
    states_of,
)

PREFIX = "transformer"

_LORA_NAMES = {
    "up": "lora_B.weight",
    "down": "lora_A.weight",
    "magnitude": "lora_magnitude_vector",
    "diff": "lora_B.bias",
}
_OTHER_NAMES = {"lokr": "lokr_", "loha": "hada_"}


@dataclass(frozen=True, eq=False)
class PeftLora:
    """One LoRA.

    Attributes:
        layers: what it does to each of PEFT's layers at strength 1, by the layer's name.
        scaling: by what the layer multiplies it at strength 1.
        config: PEFT's, with which it can be put into a model.
    """

    name: str
    layers: Mapping[str, Lora]
    scaling: Mapping[str, float]
    config: Any
    _parts: dict[frozenset[str], Lora] = field(default_factory=dict)

    def part(self, layers: frozenset[str]) -> Lora:
        """What it does to these layers."""
        if layers not in self._parts:
            first = next(iter(self.layers.values()))
            patches = [p for name, lora in self.layers.items() if name in layers for p in lora.patches]
            patches.sort(key=lambda p: (p.target[0].parameter, p.target[0].start))
            self._parts[layers] = replace(first, patches=tuple(patches))
        return self._parts[layers]

    def state(self) -> dict[str, Tensor]:
        """Its tensors as PEFT names them."""
        named = {}
        for layer, lora in self.layers.items():
            for patch in lora.patches:
                start = _OTHER_NAMES.get(patch.algorithm)
                for role, source in patch.tensors.items():
                    named[f"{layer}.{_LORA_NAMES[role] if start is None else start + role}"] = source.load()
        return named


Merged = dict[str, list[tuple[PeftLora, float]]]
"""What is in the weights of each layer, with its strength."""


@dataclass
class PeftLoras:
    """The LoRAs of a split transformer.

    Attributes:
        given: those of ``loras=`` and `set_loras`, which diffusers knows nothing of.
        loaded: by what diffusers calls an adapter name.
        merged: what `fuse` merged and `unfuse` takes out again, beside the names that PEFT's layers have of it.
        kept: what stays part of the model, because PEFT does not take it out.
    """

    checkpoint: Checkpoint
    given: tuple[AnyLora, ...] = ()
    loaded: dict[str, PeftLora] = field(default_factory=dict)
    merged: Merged = field(default_factory=dict)
    kept: Merged = field(default_factory=dict)
    _model: Any = None

    @property
    def model(self) -> Any:
        """The skeleton, which takes no memory. PEFT's layers in it say what they would say in a real model: no call on
        them depends on the content of weights."""
        if self._model is None:
            self._model = self.checkpoint.adapter.skeleton(self.checkpoint.spec)
        return self._model

    @property
    def layers(self) -> dict[str, Any]:
        """PEFT's layers in the skeleton."""
        return layers_of(self._model) if self._model is not None else {}

    def in_use(self) -> list[AnyLora]:
        """All LoRAs that the model has now, in order."""
        groups: dict[tuple[PeftLora, float], set[str]] = {}
        for where, lora, strength in self._acting():
            groups.setdefault((lora, strength), set()).add(where)
        return [*self.given, *(Applied(lora.part(frozenset(w)), s) for (lora, s), w in groups.items())]

    def _acting(self) -> Iterator[tuple[str, PeftLora, float]]:
        places = [*self.kept.items()]
        for where, layer in self.layers.items():
            if not layer.disable_adapters:
                places.append((where, self.merged.get(where, []) if layer.merged else self._active(where, layer)))
        for where, entries in places:
            yield from ((where, lora, strength) for lora, strength in entries if where in lora.layers)

    def _active(self, where: str, layer: Any) -> list[tuple[PeftLora, float]]:
        return [(self.loaded[n], self._strength(where, layer, n)) for n in layer.active_adapters if n in layer.scaling]

    def _strength(self, where: str, layer: Any, name: str) -> float:
        return float(layer.scaling[name]) / (self.loaded[name].scaling[where] or 1.0)

    def snapshot(self) -> tuple[PeftLoras, dict[str, LayerState]]:
        """To `go_back` to."""
        copies = [{where: list(entries) for where, entries in m.items()} for m in (self.merged, self.kept)]
        kept = replace(self, loaded=dict(self.loaded), merged=copies[0], kept=copies[1])
        return kept, states_of(self._model) if self._model is not None else {}

    @classmethod
    def restored(cls, snapshot: tuple[PeftLoras, dict[str, LayerState]]) -> PeftLoras:
        """The LoRAs as they were."""
        loras, states = snapshot
        loras._model = None
        for name, lora in loras.loaded.items():
            put_on(loras.model, name, lora.config, lora.state(), bare=True)
        if states:
            set_states(loras.model, states)
        return loras

    def load(self, source: Any, name: str | None, options: Mapping[str, Any], *, hotswap: bool, file: str = "") -> None:
        """Add a LoRA as diffusers does, as the only active one.

        Args:
            file: what the user gave diffusers, if it was a file; people know the LoRA by that.

        Raises:
            LoraError, LoraUnmatched: see `read_lora`.
            UnsupportedInput: a source that is neither a state dict nor a file, or a kind that cannot cross a cut.
            ValueError: as diffusers', for example if the name is taken.
        """
        label = name or Path(file).stem or "a LoRA without a name"
        state = self._own(source, options.get("prefix", PREFIX), file or label)
        lora = self.read(state, label, options, file or label)
        before = set(self.loaded)
        shape = {key: tensor.to("meta") for key, tensor in state.items()}
        self.model.load_lora_adapter(
            shape, adapter_name=name, hotswap=hotswap, **{**options, "low_cpu_mem_usage": True}
        )
        (name,) = [name] if name is not None else set(self.model.peft_config) - before
        self.take(name, lora)
        self._settle()

    def take(self, name: str, lora: Lora) -> None:
        """Know as ``name`` a LoRA that PEFT has put into the skeleton.

        Raises:
            UnsupportedInput: a kind of LoRA that cannot cross a cut.
        """
        names, by_target = names_of(self.checkpoint), {p.target: p for p in lora.patches}
        found, scaling = {}, {}
        for where, layer in self.layers.items():
            if name not in layer.scaling:
                continue
            refuse_variants(layer, where, name)
            initial = initial_scaling(layer, name)
            rows = [names.module(where), names.bias(where)]
            targets = [canonical(Patch("diff", r, {})).target for r in rows if r is not None]
            patches = [_scaled(by_target[t], initial) for t in targets if t in by_target]
            scaling[where] = 1.0 if patches and patches[0].algorithm == "lokr" else initial
            if patches:
                found[where] = replace(lora, patches=tuple(patches), unmatched=())
        if not found:
            raise LoraUnmatched(f"{lora.name} changes no layer of this model.", hint="a LoRA made for this model")
        self.loaded[name] = PeftLora(name, found, scaling, self.model.peft_config[name])

    def fuse(self, scale: float, names: Sequence[str] | None) -> None:
        """As PEFT's layers do it."""
        for where, layer in self.layers.items():
            layer.scale_layer(scale)
            for name in [*(layer.active_adapters if names is None else names)]:
                if name in layer.scaling and name not in layer.merged_adapters:
                    self.merged.setdefault(where, []).append((self.loaded[name], self._strength(where, layer, name)))
                    layer.merged_adapters.append(name)

    def unfuse(self, *, disabled_only: bool = False) -> None:
        """As PEFT's layers do it: each takes out what it would put in now.

        So what was merged stays in as far as its strength has changed since, or the LoRA is gone.
        """
        for layer in self.layers.values():
            if layer.merged and (layer.disable_adapters or not disabled_only):
                layer.merged_adapters.clear()
        self._settle()

    def _settle(self) -> None:
        """For what PEFT's layers took out by themselves: they do when a LoRA is loaded."""
        for where, layer in self.layers.items():
            for entry in [e for e in self.merged.get(where, []) if e[0].name not in layer.merged_adapters]:
                self.merged[where].remove(entry)
                self._take_out(where, layer, *entry)

    def _take_out(self, where: str, layer: Any, lora: PeftLora, strength: float) -> None:
        self._keep(where, lora, strength)
        if lora.name in layer.scaling:
            self._keep(where, self.loaded[lora.name], -self._strength(where, layer, lora.name))

    def _keep(self, where: str, lora: PeftLora, strength: float) -> None:
        entries = self.kept.setdefault(where, [])
        total = strength + sum(s for known, s in entries if known is lora)
        entries[:] = [e for e in entries if e[0] is not lora] + ([(lora, total)] if total else [])

    def unload(self) -> None:
        """As diffusers': all are forgotten; what is merged stays part of the model."""
        for where, entries in self.merged.items():
            for lora, strength in entries:
                self._keep(where, lora, strength)
        self.loaded, self.merged, self._model = {}, {}, None

    def delete(self, names: Sequence[str]) -> None:
        """As diffusers': what is merged of them stays in the weights."""
        self.model.delete_adapters(list(names))
        for name in names:
            self.loaded.pop(name, None)

    def read(self, state: Mapping[str, Tensor], name: str, options: Mapping[str, Any], where: str) -> Lora:
        """The LoRA in a state dict that diffusers or PEFT made.

        Raises:
            LoraError, LoraUnmatched: see `read_lora`.
        """
        named = dict(state)
        for key, alpha in (options.get("network_alphas") or {}).items():
            import torch

            named[key if key.endswith(".alpha") else f"{key}.alpha"] = torch.tensor(float(alpha))
        metadata = options.get("metadata")
        note = {"lora_adapter_metadata": json.dumps(metadata, default=list)} if metadata else {}
        return warn_of_unmatched(lora_of_state(named, self.checkpoint, name, note, where))

    def _own(self, source: Any, prefix: str | None, where: str) -> dict[str, Tensor]:
        if not isinstance(source, Mapping):
            raise UnsupportedInput(
                f"A LoRA cannot be loaded into a split transformer from {str(source)[:100]!r}.",
                hint="pipe.load_lora_weights(...), or the path of a .safetensors file",
            )
        own = {k: v for k, v in source.items() if prefix is None or k.startswith(f"{prefix}.")}
        if not own:
            raise self._nothing_for_us(source, prefix, where)
        # The caller may change its tensors later.
        return {key: tensor.detach().to("cpu", copy=True) for key, tensor in own.items()}

    def _nothing_for_us(self, source: Mapping[str, Any], prefix: str | None, where: str) -> LoraUnmatched:
        keys = f": none of its {len(source)} keys begins with {prefix}, for example {min(source)}" if source else ""
        spec = self.checkpoint.spec
        hint = f"a LoRA that was made for {spec.family} {spec.variant}; mesh lora inspect FILE shows what one is"
        try:
            lora_of_state(source, self.checkpoint, "", {})
            hint = "mesh_core.set_loras(pipeline, [FILE]), or loras=[FILE]: they read namings that diffusers does not"
        except LoraError:
            pass
        return LoraUnmatched(f"{where} holds nothing for the transformer{keys}.", hint=hint)


def _scaled(patch: Patch, scaling: float) -> Patch:
    """The same patch, which multiplies by what PEFT's layer does. For lokr, strengths do that."""
    if patch.algorithm == "lokr":
        return replace(patch, alpha=None)
    if patch.algorithm == "diff":
        return canonical(replace(patch, alpha=scaling))
    rank = patch.tensors["down" if patch.algorithm == "lora" else "w1_b"].shape[0]
    # What was divided is a round number again: the LoRA is known by it.
    return canonical(replace(patch, alpha=round(scaling * rank, 12)))
