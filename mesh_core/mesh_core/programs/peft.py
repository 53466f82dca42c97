"""Diffusers' LoRA calls on a split transformer: what they do on a whole one, they do here and on the workers.

Diffusers injects PEFT layers into a model; a split model has only some of its layers here, so the calls are answered
from a list of LoRAs instead, and the list is merged into the weights on every machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from mesh_core.errors import UnsupportedInput
from mesh_core.host.loras import AnyLora
from mesh_core.loras.lora import Applied, Lora
from mesh_core.loras.read import lora_of_state, read_lora, warn_of_unmatched
from mesh_core.model.library import Checkpoint

PREFIX = "transformer"


@dataclass
class Adapter:
    """One loaded LoRA: in our form, and as diffusers gave it, to be given back when the model is whole again."""

    lora: Lora
    state: dict[str, Tensor] | str
    options: dict[str, Any]
    weight: float = 1.0


@dataclass
class Adapters:
    """The LoRAs of a split transformer, in the terms of diffusers.

    Attributes:
        given: those of ``loras=`` and `set_loras`, which diffusers knows nothing of.
        loaded: by adapter name.
        active: names of those in use.
        fused: names and strengths; while there are any, ``active`` rests, as with PEFT.
        kept: what was fused when the adapters were unloaded: part of the model from then on.
        on: whether adapters are enabled.
    """

    checkpoint: Checkpoint
    given: tuple[AnyLora, ...] = ()
    loaded: dict[str, Adapter] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    fused: list[tuple[str, float]] = field(default_factory=list)
    kept: list[tuple[Adapter, float]] = field(default_factory=list)
    on: bool = True

    def in_use(self) -> list[AnyLora]:
        """All LoRAs that the model has now, in order."""
        found: list[AnyLora] = [*self.given, *(Applied(a.lora, s) for a, s in self.kept)]
        if self.on:
            named = self.fused or [(name, self.loaded[name].weight) for name in self.active]
            found += [Applied(self.loaded[name].lora, s) for name, s in named]
        return found

    def load(self, source: Any, name: str | None, options: Mapping[str, Any], *, hotswap: bool) -> str:
        """Add an adapter, as the only active one; returns its name.

        Raises:
            LoraError, LoraUnmatched: see `read_lora`.
            UnsupportedInput: a source that is neither a state dict nor a file.
        """
        if name is None:
            numbers = (i for i in range(len(self.loaded) + 1) if f"default_{i}" not in self.loaded)
            name = f"default_{next(numbers)}"
        if (name in self.loaded) != hotswap:
            raise ValueError(
                f"Adapter name {name} already in use in the model - please select a new adapter name."
                if name in self.loaded
                else f"There is no adapter {name!r} to swap."
            )
        lora, state = self._read(source, name, options)
        if hotswap:
            self.loaded[name] = Adapter(lora, state, dict(options), self.loaded[name].weight)
            return name
        self.loaded[name] = Adapter(lora, state, dict(options))
        self.active = [name]
        return name

    def _read(self, source: Any, name: str, options: Mapping[str, Any]) -> tuple[Lora, dict[str, Tensor] | str]:
        if isinstance(source, (str, Path)) and Path(source).is_file():
            return warn_of_unmatched(read_lora(source, self.checkpoint, name)), str(source)
        if not isinstance(source, Mapping):
            raise UnsupportedInput(
                f"A LoRA cannot be loaded into a split transformer from {str(source)[:100]!r}.",
                hint="pipe.load_lora_weights(...), or the path of a .safetensors file",
            )
        prefix = options.get("prefix", PREFIX)
        own = {k: v for k, v in source.items() if prefix is None or k.startswith(f"{prefix}.")}
        # The caller may change its tensors later.
        state = {key: tensor.detach().to("cpu", copy=True) for key, tensor in own.items()}
        named = dict(state)
        for key, alpha in (options.get("network_alphas") or {}).items():
            import torch

            named[key if key.endswith(".alpha") else f"{key}.alpha"] = torch.tensor(float(alpha))
        metadata = options.get("metadata")
        note = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else {}
        return warn_of_unmatched(lora_of_state(named, self.checkpoint, name, note)), state


class LoraCalls(nn.Module):
    """Mixed into a split transformer, in front of diffusers' ``PeftAdapterMixin``."""

    _mesh_adapters: Adapters

    def _mesh_apply_loras(self) -> None:
        cast(Any, self).mesh.set_loras(self._mesh_adapters.in_use())

    def _mesh_change(self, change: Callable[[Adapters], None]) -> None:
        """Change the list of LoRAs and the model with it; both stay as they were when that fails."""
        before = self._mesh_adapters
        draft = Adapters(
            before.checkpoint,
            before.given,
            {name: Adapter(a.lora, a.state, a.options, a.weight) for name, a in before.loaded.items()},
            list(before.active),
            list(before.fused),
            list(before.kept),
            before.on,
        )
        change(draft)
        self._mesh_adapters = draft
        try:
            self._mesh_apply_loras()
        except BaseException:
            self._mesh_adapters = before
            self._mesh_apply_loras()
            raise

    @property
    def peft_config(self) -> dict[str, Any]:
        if not self._mesh_adapters.loaded:
            raise AttributeError("peft_config")
        return {name: adapter.options for name, adapter in self._mesh_adapters.loaded.items()}

    @property
    def _hf_peft_config_loaded(self) -> bool:
        return bool(self._mesh_adapters.loaded)

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = PREFIX,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """As diffusers': the LoRA becomes the active one."""
        kwargs.pop("_pipeline", None)
        name = kwargs.pop("adapter_name", None)
        source, options = pretrained_model_name_or_path_or_dict, {**kwargs, "prefix": prefix}

        def change(adapters: Adapters) -> None:
            adapters.load(source, name, options, hotswap=hotswap)

        self._mesh_change(change)

    def set_adapters(self, adapter_names: str | list[str], weights: Any = None) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(names)
        if len(given) != len(names):
            raise ValueError(f"{len(names)} adapters and {len(given)} weights.")
        if odd := next((w for w in given if w is not None and not isinstance(w, (int, float))), None):
            raise UnsupportedInput(f"Strengths by block ({odd}) cannot cross a cut.", hint="one number per LoRA")

        def change(adapters: Adapters) -> None:
            for name, weight in zip(names, given, strict=True):
                adapters.loaded[name].weight = 1.0 if weight is None else float(weight)
            adapters.active = names

        self._known(names)
        self._mesh_change(change)

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._known(names)
        self._mesh_change(lambda a: setattr(a, "active", names))

    def active_adapters(self) -> list[str]:
        return list(self._mesh_adapters.active)

    def disable_lora(self) -> None:
        self._mesh_change(lambda a: setattr(a, "on", False))

    def enable_lora(self) -> None:
        self._mesh_change(lambda a: setattr(a, "on", True))

    disable_adapters = disable_lora
    enable_adapters = enable_lora

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        def change(adapters: Adapters) -> None:
            for name in adapters.active:
                adapters.loaded[name].weight *= lora_scale
            merged = {name for name, _ in adapters.fused}
            names = adapters.active if adapter_names is None else adapter_names
            adapters.fused += [(n, adapters.loaded[n].weight) for n in names if n not in merged]

        self._known(adapter_names or [])
        self._mesh_change(change)

    def unfuse_lora(self) -> None:
        self._mesh_change(lambda a: a.fused.clear())

    def unload_lora(self) -> None:
        def change(adapters: Adapters) -> None:
            adapters.kept += [(adapters.loaded[name], strength) for name, strength in adapters.fused]
            adapters.loaded, adapters.active, adapters.fused, adapters.on = {}, [], [], True

        self._mesh_change(change)

    def delete_adapters(self, adapter_names: str | list[str]) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)

        def change(adapters: Adapters) -> None:
            for name in names:
                adapters.loaded.pop(name, None)
            adapters.active = [n for n in adapters.active if n not in names]
            adapters.fused = [(n, s) for n, s in adapters.fused if n not in names]

        self._mesh_change(change)

    def modules(self, *args: Any, **kwargs: Any) -> Iterator[nn.Module]:
        """Also one that stands for all PEFT layers: pipelines look for those to learn what is active and fused."""
        yield from super().modules(*args, **kwargs)
        if self._mesh_adapters.loaded:
            yield _stand_in()(self)

    def _known(self, names: Sequence[str]) -> None:
        loaded = self._mesh_adapters.loaded
        if missing := [name for name in names if name not in loaded]:
            raise ValueError(f"There is no adapter {missing[0]!r}; loaded are {sorted(loaded)}.")


@cache
def _stand_in() -> Any:
    """The class of what answers for all PEFT layers that the model would have."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    def active(self: Any) -> list[str]:
        return list(self.__dict__["_model"].active_adapters())

    def merged(self: Any) -> list[str]:
        return [name for name, _ in self.__dict__["_model"]._mesh_adapters.fused]

    def make(self: Any, model: LoraCalls) -> None:
        nn.Module.__init__(self)
        self.__dict__["_model"] = model

    answers = {
        "__init__": make,
        "active_adapters": property(active),
        "merged_adapters": property(merged),
        "unmerge": lambda self: self.__dict__["_model"].unfuse_lora(),
    }
    return type("StandIn", (nn.Module, BaseTunerLayer), answers)
