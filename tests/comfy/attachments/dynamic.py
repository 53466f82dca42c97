"""Nodes for tests: ComfyUI's dynamic memory management, which it has for NVIDIA's GPUs only, on the CPU.

Pages of a GPU and pinned memory are stand-ins that know whose they are; all else is ComfyUI's own.
"""

from __future__ import annotations

from functools import cache
from typing import Any


class _Pages:
    """Stands for ``comfy_aimdo.model_vbar.ModelVBAR``."""

    def alloc(self, size: int) -> list[_Pages]:
        return [self]

    def prioritize(self) -> None: ...

    def loaded_size(self) -> int:
        return 0

    def free_memory(self, size: int) -> int:
        return 0


class _HostBuffer:
    size = 0

    def __init__(self, *sizes: int) -> None: ...

    def truncate(self, *arguments: Any, **named: Any) -> None: ...


@cache
def _dynamic() -> Any:
    import comfy_aimdo.host_buffer
    from comfy.model_patcher import ModelPatcherDynamic

    comfy_aimdo.host_buffer.HostBuffer = _HostBuffer

    class OnCpu(ModelPatcherDynamic):
        def __new__(cls, *arguments: Any, **named: Any) -> Any:
            return object.__new__(cls)

        def _vbar_get(self, create: bool = False) -> Any:
            return self.model.dynamic_vbars.setdefault(self.load_device, _Pages())

        def partially_unload(self, *arguments: Any, **named: Any) -> int:
            return int(self.restore_loaded_backups())

    return OnCpu


class TestDynamic:
    """The model that a loader made, under dynamic memory management."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def make(self, model: Any) -> tuple[Any]:
        made = _dynamic()(model.model, model.load_device, model.offload_device)
        made.cached_patcher_init = model.cached_patcher_init
        return (made,)


class TestNotDynamic(TestDynamic):
    """What ComfyUI samples when hooks are in the way of dynamic memory management."""

    def make(self, model: Any) -> tuple[Any]:
        return (model.get_non_dynamic_delegate(),)


class TestPages:
    """Whose pages and pins the modules of two models hold, when both were sampled."""

    RETURN_TYPES = ()
    FUNCTION = "look"
    OUTPUT_NODE = True
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"one": ("MODEL",), "other": ("MODEL",), "after": ("LATENT",)}}

    def look(self, one: Any, other: Any, after: Any) -> dict[str, Any]:
        def held(patcher: Any) -> tuple[list[int], set[int]]:
            modules = list(patcher.model.modules())
            pages = [id(m._v[0]) for m in modules if hasattr(m, "_v")]
            pins = {id(m._pin_state) for m in modules if hasattr(m, "_pin_state")}
            return pages, pins | {id(patcher.model.dynamic_pins), id(patcher.model.dynamic_vbars)}

        pages, others = held(one), held(other)
        counts = {"pages": [len(pages[0]), len(others[0])], "owners": [len(set(pages[0])), len(set(others[0]))]}
        shared = len(set(pages[0]) & set(others[0])) + len(pages[1] & others[1])
        return {"ui": {**counts, "shared": [shared], "kinds": [type(one).__name__, type(other).__name__]}}


NODES = (TestDynamic, TestNotDynamic, TestPages)
