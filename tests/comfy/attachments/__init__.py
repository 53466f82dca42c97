"""Nodes for tests: what other packs attach to a model or a conditioning."""

from __future__ import annotations

from typing import Any

import torch

from . import dynamic, ltx


class _OnModel:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "attach"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        text, number = ("STRING", {"default": ""}), ("INT", {"default": 0})
        return {"required": {"model": ("MODEL",)}, "optional": {"kind": text, "name": text, "number": number}}

    def attach(self, model: Any, **inputs: Any) -> tuple[Any]:
        clone = model.clone()
        self.put(clone, **inputs)
        return (clone,)


class TestPatchBlock(_OnModel):
    def put(self, model: Any, kind: str, name: str, number: int) -> None:
        def replaced(arguments: dict[str, Any], extra: dict[str, Any]) -> Any:
            out = extra["original_block"](arguments)
            return {**out, "img": out["img"] * 1.1}

        model.set_model_patch_replace(replaced, kind, name, number)


class TestBlockPatch(_OnModel):
    def put(self, model: Any, kind: str) -> None:
        model.set_model_patch(lambda arguments: arguments, kind)


class TestAttention(_OnModel):
    def put(self, model: Any) -> None:
        model.model_options["transformer_options"]["optimized_attention_override"] = lambda original, *a, **k: original(
            *a, **k
        )


class TestInjection(_OnModel):
    def put(self, model: Any) -> None:
        from comfy.patcher_extension import PatcherInjection

        model.set_injections("test", [PatcherInjection(lambda patcher: None, lambda patcher: None)])


class TestObjectPatch(_OnModel):
    def put(self, model: Any, name: str) -> None:
        model.add_object_patch(name, model.get_model_object(name))


class TestLate(_OnModel):
    """Replaces a block while sampling, as guidance nodes do: in a function around the model, or in an inner wrapper."""

    def put(self, model: Any, kind: str, name: str, number: int) -> None:
        def with_replaced(options: dict[str, Any]) -> dict[str, Any]:
            def replaced(arguments: dict[str, Any], extra: dict[str, Any]) -> Any:
                return arguments

            return {**options, "patches_replace": {"dit": {(name, number): replaced}}}

        def around(apply: Any, given: dict[str, Any]) -> Any:
            conditioning = {**given["c"], "transformer_options": with_replaced(given["c"]["transformer_options"])}
            return apply(given["input"], given["timestep"], **conditioning)

        def inside(executor: Any, *args: Any, **kwargs: Any) -> Any:
            return executor(*(with_replaced(a) if isinstance(a, dict) else a for a in args), **kwargs)

        if kind == "function":
            model.set_model_unet_function_wrapper(around)
        else:
            from comfy.patcher_extension import WrappersMP

            model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", inside)


class TestResiduals:
    """Stands for a ControlNet that adds to every double block."""

    previous_controlnet = None
    extra_hooks = None

    def get_models(self) -> list[Any]:
        return []

    def get_extra_hooks(self) -> list[Any]:
        return []

    def inference_memory_requirements(self, dtype: torch.dtype) -> int:
        return 0

    def pre_run(self, model: Any, percent: Any) -> None: ...

    def cleanup(self) -> None: ...

    def get_control(self, x: torch.Tensor, *others: Any) -> dict[str, Any]:
        return {"input": [torch.ones(1, 1, 1)] * 4}


class _OnConditioning:
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "attach"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"conditioning": ("CONDITIONING",)}}

    def attach(self, conditioning: Any) -> tuple[Any]:
        return ([[embedding, {**options, **self.added()}] for embedding, options in conditioning],)


class TestControl(_OnConditioning):
    def added(self) -> dict[str, Any]:
        return {"control": TestResiduals()}


class TestMask(_OnConditioning):
    def added(self) -> dict[str, Any]:
        return {"attention_mask": torch.ones(1, 1)}


class TestMemory:
    """What ComfyUI's memory management holds of a model now, in bytes; at every run anew."""

    RETURN_TYPES = ()
    FUNCTION = "measure"
    OUTPUT_NODE = True
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}, "optional": {"after": ("LATENT",)}}

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        return float("nan")

    def measure(self, model: Any, after: Any = None) -> dict[str, Any]:
        from comfy import model_management

        held = [m.model_memory() for m in model_management.current_loaded_models if m.model is not None]
        return {"ui": {"size": [model.model_size()], "loaded": [model.loaded_size()], "managed": held}}


_NODES = (
    TestPatchBlock,
    TestBlockPatch,
    TestAttention,
    TestInjection,
    TestObjectPatch,
    TestLate,
    TestControl,
    TestMask,
    TestMemory,
    *dynamic.NODES,
    *ltx.NODES,
)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in _NODES}
