"""Diffusers' LoRA calls on a split transformer: what they do on a whole one, they do here and on the workers.

Each call changes a `PeftLoras`, which is then merged into the weights on every machine.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

from torch import nn

from mesh_core.errors import UnsupportedInput
from mesh_core.programs.peft import PREFIX, PeftLoras


class LoraCalls(nn.Module):
    """Mixed into a split transformer, in front of diffusers' ``PeftAdapterMixin``."""

    _mesh_loras: PeftLoras

    def _mesh_apply_loras(self) -> None:
        cast(Any, self).mesh.set_loras(self._mesh_loras.in_use())

    def _mesh_change(self, change: Callable[[PeftLoras], None]) -> None:
        """Change the list of LoRAs and the model with it; both stay as they were when that fails."""
        before = self._mesh_loras
        draft = before.copy()
        change(draft)
        self._mesh_loras = draft
        try:
            self._mesh_apply_loras()
        except BaseException:
            self._mesh_loras = before
            self._mesh_apply_loras()
            raise

    @property
    def peft_config(self) -> dict[str, Any]:
        """What each LoRA was loaded with, by name. AttributeError while there is none: that is how pipelines ask."""
        if not self._mesh_loras.loaded:
            raise AttributeError("peft_config")
        return {name: lora.options for name, lora in self._mesh_loras.loaded.items()}

    @property
    def _hf_peft_config_loaded(self) -> bool:
        return bool(self._mesh_loras.loaded)

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = PREFIX,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """As diffusers': the LoRA becomes the only active one.

        Raises:
            LoraError, LoraUnmatched: see `PeftLoras.load`; nothing has changed then.
            ValueError: its name is taken, or there is none to swap.
        """
        kwargs.pop("_pipeline", None)
        name = kwargs.pop("adapter_name", None)
        source, options = pretrained_model_name_or_path_or_dict, {**kwargs, "prefix": prefix}
        file = _file_given()

        def change(loras: PeftLoras) -> None:
            loras.load(source, name, options, hotswap=hotswap, file=file)

        self._mesh_change(change)

    def set_adapters(self, adapter_names: str | list[str], weights: Any = None) -> None:
        """As diffusers': these LoRAs, and no others, with these strengths (1.0 where none is given).

        Raises:
            UnsupportedInput: a strength that is no single number.
            ValueError: a name that was not loaded, or not as many strengths as names.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(names)
        if len(given) != len(names):
            raise ValueError(f"{len(names)} adapters and {len(given)} weights.")
        if odd := next((w for w in given if w is not None and not isinstance(w, (int, float))), None):
            raise UnsupportedInput(f"Strengths by block ({odd}) cannot cross a cut.", hint="one number per LoRA")

        def change(loras: PeftLoras) -> None:
            for name, weight in zip(names, given, strict=True):
                loras.loaded[name].weight = 1.0 if weight is None else float(weight)
            loras.active = names

        self._known(names)
        self._mesh_change(change)

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """As diffusers': these LoRAs and no others, with the strengths that they have."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._known(names)
        self._mesh_change(lambda a: setattr(a, "active", names))

    def active_adapters(self) -> list[str]:
        """Names of the LoRAs in use, also while they are disabled."""
        return list(self._mesh_loras.active)

    def disable_lora(self) -> None:
        """As diffusers': none has an effect until `enable_lora`; what is loaded stays."""
        self._mesh_change(lambda a: setattr(a, "on", False))

    def enable_lora(self) -> None:
        """Undo `disable_lora`."""
        self._mesh_change(lambda a: setattr(a, "on", True))

    disable_adapters = disable_lora
    enable_adapters = enable_lora

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """As diffusers': LoRAs keep acting with these strengths until `unfuse_lora`, whichever are active."""

        def change(loras: PeftLoras) -> None:
            for name in loras.active:
                loras.loaded[name].weight *= lora_scale
            merged = {name for name, _ in loras.fused}
            names = loras.active if adapter_names is None else adapter_names
            loras.fused += [(n, loras.loaded[n].weight) for n in names if n not in merged]

        self._known(adapter_names or [])
        self._mesh_change(change)

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`: the active LoRAs act again."""
        self._mesh_change(lambda a: a.fused.clear())

    def unload_lora(self) -> None:
        """As diffusers': all are forgotten; what is fused stays part of the model."""

        def change(loras: PeftLoras) -> None:
            loras.kept += [(loras.loaded[name], strength) for name, strength in loras.fused]
            loras.loaded, loras.active, loras.fused, loras.on = {}, [], [], True

        self._mesh_change(change)

    def delete_adapters(self, adapter_names: str | list[str]) -> None:
        """As diffusers': forget these LoRAs; unknown names are passed over."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)

        def change(loras: PeftLoras) -> None:
            for name in names:
                loras.loaded.pop(name, None)
            loras.active = [n for n in loras.active if n not in names]
            loras.fused = [(n, s) for n, s in loras.fused if n not in names]

        self._mesh_change(change)

    def modules(self, *args: Any, **kwargs: Any) -> Iterator[nn.Module]:
        """Also one that stands for all PEFT layers: pipelines look for those to learn what is active and fused."""
        yield from super().modules(*args, **kwargs)
        if self._mesh_loras.loaded:
            yield _stand_in()(self)

    def _known(self, names: Sequence[str]) -> None:
        loaded = self._mesh_loras.loaded
        if missing := [name for name in names if name not in loaded]:
            raise ValueError(f"There is no adapter {missing[0]!r}; loaded are {sorted(loaded)}.")


def _file_given() -> str:
    """The file that a pipeline's ``load_lora_weights`` was called with, for messages; empty if there is none.

    Pipelines read the file and hand on its tensors only, under a name like ``default_0`` that tells nobody anything.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "load_lora_weights":
        frame = frame.f_back
    given = frame.f_locals if frame is not None else {}
    source = given.get("pretrained_model_name_or_path_or_dict")
    if not isinstance(source, (str, Path)):
        return ""
    inner = (given.get("kwargs") or {}).get("weight_name")
    return str(Path(source, inner) if isinstance(inner, str) else source)


@cache
def _stand_in() -> Any:
    """The class of what answers for all PEFT layers that the model would have."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    def active(self: Any) -> list[str]:
        return list(self.__dict__["_model"].active_adapters())

    def merged(self: Any) -> list[str]:
        return [name for name, _ in self.__dict__["_model"]._mesh_loras.fused]

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
