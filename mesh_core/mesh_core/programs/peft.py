"""The LoRAs of a split transformer as diffusers' calls name and weigh them, in place of PEFT's layers.

Diffusers injects PEFT layers into a model; a split model has only some of its layers here, so the calls are answered
from this list instead. What diffusers calls an adapter is a LoRA here: an adapter is a model family.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mesh_core.errors import LoraUnmatched, UnsupportedInput
from mesh_core.host.loras import AnyLora
from mesh_core.loras.lora import Applied, Lora
from mesh_core.loras.read import lora_of_state, read_lora, warn_of_unmatched
from mesh_core.model.library import Checkpoint

PREFIX = "transformer"


@dataclass
class PeftLora:
    """One loaded LoRA: in our form, and as diffusers gave it, to be given back when the model is whole again."""

    lora: Lora
    state: dict[str, Tensor] | str
    options: dict[str, Any]
    weight: float = 1.0


@dataclass
class PeftLoras:
    """The LoRAs of a split transformer, in the terms of diffusers.

    Attributes:
        given: those of ``loras=`` and `set_loras`, which diffusers knows nothing of.
        loaded: by what diffusers calls an adapter name.
        active: names of those in use.
        fused: names and strengths; while there are any, ``active`` rests, as with PEFT.
        kept: what was fused when the LoRAs were unloaded: part of the model from then on.
        on: whether the loaded ones are enabled.
    """

    checkpoint: Checkpoint
    given: tuple[AnyLora, ...] = ()
    loaded: dict[str, PeftLora] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    fused: list[tuple[str, float]] = field(default_factory=list)
    kept: list[tuple[PeftLora, float]] = field(default_factory=list)
    on: bool = True

    def copy(self) -> PeftLoras:
        """Another list of the same LoRAs, to be changed without changing this one."""
        return replace(
            self,
            loaded={name: replace(lora) for name, lora in self.loaded.items()},
            active=list(self.active),
            fused=list(self.fused),
            kept=list(self.kept),
        )

    def in_use(self) -> list[AnyLora]:
        """All LoRAs that the model has now, in order."""
        found: list[AnyLora] = [*self.given, *(Applied(a.lora, s) for a, s in self.kept)]
        if self.on:
            named = self.fused or [(name, self.loaded[name].weight) for name in self.active]
            found += [Applied(self.loaded[name].lora, s) for name, s in named]
        return found

    def load(self, source: Any, name: str | None, options: Mapping[str, Any], *, hotswap: bool, file: str = "") -> str:
        """Add a LoRA, as the only active one; returns its name.

        Args:
            file: what the user gave diffusers, if it was a file; people know the LoRA by that.

        Raises:
            LoraError, LoraUnmatched: see `read_lora`.
            UnsupportedInput: a source that is neither a state dict nor a file.
        """
        label = name or Path(file).stem or "a LoRA without a name"
        if name is None:
            numbers = (i for i in range(len(self.loaded) + 1) if f"default_{i}" not in self.loaded)
            name = f"default_{next(numbers)}"
        if (name in self.loaded) != hotswap:
            raise ValueError(
                f"Adapter name {name} already in use in the model - please select a new adapter name."
                if name in self.loaded
                else f"There is no adapter {name!r} to swap."
            )
        lora, state = self._read(source, label, options, file or label)
        if hotswap:
            self.loaded[name] = PeftLora(lora, state, dict(options), self.loaded[name].weight)
            return name
        self.loaded[name] = PeftLora(lora, state, dict(options))
        self.active = [name]
        return name

    def _read(
        self, source: Any, name: str, options: Mapping[str, Any], where: str
    ) -> tuple[Lora, dict[str, Tensor] | str]:
        if isinstance(source, (str, Path)) and Path(source).is_file():
            return warn_of_unmatched(read_lora(source, self.checkpoint, name)), str(source)
        if not isinstance(source, Mapping):
            raise UnsupportedInput(
                f"A LoRA cannot be loaded into a split transformer from {str(source)[:100]!r}.",
                hint="pipe.load_lora_weights(...), or the path of a .safetensors file",
            )
        prefix = options.get("prefix", PREFIX)
        own = {k: v for k, v in source.items() if prefix is None or k.startswith(f"{prefix}.")}
        if not own:
            raise self._nothing_for_us(source, prefix, where)
        # The caller may change its tensors later.
        state = {key: tensor.detach().to("cpu", copy=True) for key, tensor in own.items()}
        named = dict(state)
        for key, alpha in (options.get("network_alphas") or {}).items():
            import torch

            named[key if key.endswith(".alpha") else f"{key}.alpha"] = torch.tensor(float(alpha))
        metadata = options.get("metadata")
        note = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else {}
        return warn_of_unmatched(lora_of_state(named, self.checkpoint, name, note, where)), state

    def _nothing_for_us(self, source: Mapping[str, Any], prefix: str | None, where: str) -> LoraUnmatched:
        keys = f": none of its {len(source)} keys begins with {prefix}, for example {min(source)}" if source else ""
        spec = self.checkpoint.spec
        return LoraUnmatched(
            f"{where} holds nothing for the transformer{keys}.",
            hint=f"a LoRA that was made for {spec.family} {spec.variant}; mesh lora inspect FILE shows what one is",
        )
