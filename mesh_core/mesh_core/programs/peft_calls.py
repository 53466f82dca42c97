"""Diffusers' LoRA calls on a split transformer: what they do on a whole one, they do here and on the workers.

Each call changes a `PeftLoras`, which is then merged into the weights on every machine.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

from torch import nn

from mesh_core.errors import UnsupportedInput
from mesh_core.programs.peft import PREFIX, PeftLoras

_FILE_NAME = "pytorch_lora_weights.safetensors"
"""In a folder, where no other name is given; diffusers'."""


class LoraCalls(nn.Module):
    """Mixed into a split transformer, in front of diffusers' ``PeftAdapterMixin``."""

    _mesh_loras: PeftLoras

    def _mesh_apply_loras(self) -> None:
        cast(Any, self).mesh.set_loras(self._mesh_loras.in_use())

    def _mesh_change(self, change: Callable[[PeftLoras], None]) -> None:
        """Change the list of LoRAs and the model with it; both stay as they were when that fails."""
        before = self._mesh_loras.snapshot()
        try:
            change(self._mesh_loras)
        except BaseException:
            self._mesh_loras = PeftLoras.restored(before)
            raise
        try:
            self._mesh_apply_loras()
        except BaseException:
            self._mesh_loras = PeftLoras.restored(before)
            self._mesh_apply_loras()
            raise

    def _mesh_settle_loras(self) -> None:
        """Before a step: PEFT's layers that are disabled take out what was merged when they run, and not before."""
        if any(layer.disable_adapters and layer.merged for layer in self._mesh_loras.layers.values()):
            self._mesh_change(lambda loras: loras.unfuse(disabled_only=True))

    @property
    def peft_config(self) -> dict[str, Any]:
        """PEFT's, by name. AttributeError while there is none: that is how pipelines ask."""
        return cast("dict[str, Any]", self._mesh_loras.model.peft_config)

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
            LoraError, LoraUnmatched, UnsupportedInput, ValueError: see `PeftLoras.load`; nothing has changed then.
        """
        kwargs.pop("_pipeline", None)
        name = kwargs.pop("adapter_name", None)
        source, file = pretrained_model_name_or_path_or_dict, _file_given()
        if not isinstance(source, Mapping):
            source, metadata, file = _read(source, kwargs.pop("weight_name", None))
            kwargs.setdefault("metadata", metadata)
        options = {**kwargs, "prefix": prefix}
        self._mesh_change(lambda loras: loras.load(source, name, options, hotswap=hotswap, file=file))

    def set_adapters(self, adapter_names: str | list[str], weights: Any = None) -> None:
        """As diffusers': these LoRAs, and no others, with these strengths (1.0 where none is given)."""
        self._mesh_change(lambda loras: loras.model.set_adapters(adapter_names, weights))

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """As diffusers': these LoRAs and no others, with the strengths that they have."""
        self._mesh_change(lambda loras: loras.model.set_adapter(adapter_name))

    def active_adapters(self) -> list[str]:
        """Names of the LoRAs in use, also while they are disabled. ValueError while none is loaded."""
        return cast("list[str]", self._mesh_loras.model.active_adapters())

    def disable_lora(self) -> None:
        """As diffusers': none has an effect until `enable_lora`; what is loaded stays."""
        self._mesh_change(lambda loras: loras.model.disable_lora())

    def enable_lora(self) -> None:
        """Undo `disable_lora`."""
        self._mesh_change(lambda loras: loras.model.enable_lora())

    def disable_adapters(self) -> None:
        """As `disable_lora`; ValueError while none is loaded."""
        self._mesh_change(lambda loras: loras.model.disable_adapters())

    def enable_adapters(self) -> None:
        """As `enable_lora`; ValueError while none is loaded."""
        self._mesh_change(lambda loras: loras.model.enable_adapters())

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """As diffusers': LoRAs keep acting with these strengths until `unfuse_lora`, whichever are active."""
        self._mesh_change(lambda loras: loras.fuse(lora_scale, adapter_names))

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`: the active LoRAs act again."""
        self._mesh_change(lambda loras: loras.unfuse())

    def unload_lora(self) -> None:
        """As diffusers': all are forgotten; what is fused stays part of the model."""
        self._mesh_change(lambda loras: loras.unload())

    def delete_adapters(self, adapter_names: str | list[str]) -> None:
        """As diffusers': forget these LoRAs; unknown names are passed over."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._mesh_change(lambda loras: loras.delete(names))

    def save_lora_adapter(
        self,
        save_directory: str | Path,
        adapter_name: str | None = "default",
        upcast_before_saving: bool = False,
        safe_serialization: bool = True,
        weight_name: str | None = None,
    ) -> None:
        """As diffusers', but for tensors in memory only: the model keeps its type.

        Raises:
            ValueError: there is no such LoRA, or ``save_directory`` is a file.
            UnsupportedInput: it is not to be a .safetensors file.
        """
        import torch
        from safetensors.torch import save_file

        lora = self._mesh_loras.loaded.get(str(adapter_name))
        if lora is None:
            raise ValueError(f"Adapter name {adapter_name} not found in the model.")
        if not safe_serialization:
            raise UnsupportedInput("A LoRA is saved as .safetensors only.", hint="safe_serialization=True")
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"Provided path ({folder}) should be a directory, not a file")
        folder.mkdir(parents=True, exist_ok=True)
        dtype = torch.float32 if upcast_before_saving else cast(Any, self).dtype
        state = {key: tensor.to(dtype).contiguous() for key, tensor in lora.state().items()}
        config = json.dumps(lora.config.to_dict(), indent=2, sort_keys=True, default=list)
        save_file(state, folder / (weight_name or _FILE_NAME), {"format": "pt", "lora_adapter_metadata": config})

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: UnsupportedInput. It is for training, which needs all layers here."""
        raise UnsupportedInput(
            "A new LoRA cannot be made on a split model: training it would need all layers here.",
            hint="unsplit() first; pipe.load_lora_weights(...) for one that exists",
        )

    def enable_lora_hotswap(self, *args: Any, **kwargs: Any) -> None:
        """Refused: UnsupportedInput. It prepares a compiled model, which a split one is not."""
        raise UnsupportedInput(
            "A split model cannot be prepared for swapping LoRAs of other ranks in place.",
            hint="delete_adapters(...), then load_lora_weights(...): on a split model that costs no more",
        )

    def modules(self, *args: Any, **kwargs: Any) -> Iterator[nn.Module]:
        """Also one that stands for all PEFT layers: pipelines look for those to learn what is active and fused."""
        yield from super().modules(*args, **kwargs)
        if self._mesh_loras.layers:
            yield _stand_in()(self)


def _read(source: Any, weight_name: str | None) -> tuple[dict[str, Any], dict[str, Any] | None, str]:
    """State dict and PEFT's metadata of a file on this machine, and the file.

    Raises:
        UnsupportedInput: no file that exists.
    """
    from safetensors import safe_open

    path = Path(source)
    if path.is_dir():
        path /= weight_name or _FILE_NAME
    if not path.is_file() or path.suffix != ".safetensors":
        raise UnsupportedInput(
            f"A LoRA cannot be loaded into a split transformer from {str(path)[:200]!r}.",
            hint="pipe.load_lora_weights(...), or the path of a .safetensors file",
        )
    with safe_open(path, "pt") as file:
        metadata = (file.metadata() or {}).get("lora_adapter_metadata")
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return state, json.loads(metadata) if metadata else None, str(path)


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

    def layers(self: Any) -> list[Any]:
        return list(self.__dict__["_model"]._mesh_loras.layers.values())

    def make(self: Any, model: LoraCalls) -> None:
        nn.Module.__init__(self)
        self.__dict__["_model"] = model

    answers = {
        "__init__": make,
        "active_adapters": property(lambda self: list(layers(self)[0].active_adapters)),
        "merged_adapters": property(
            lambda self: list(dict.fromkeys(n for x in layers(self) for n in x.merged_adapters))
        ),
        "unmerge": lambda self: self.__dict__["_model"].unfuse_lora(),
        # Where tensors of LoRAs lie on this machine changes nothing: `set_lora_device` finds none to move.
        "lora_A": {},
    }
    return type("StandIn", (nn.Module, BaseTunerLayer), answers)
