"""Are the parts of ComfyUI that this pack builds on as it expects them? Looked at when ComfyUI starts."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from mesh_core.errors import PluginIncompatible
from mesh_core.programs.comfy import ComfySide, Expected

OLDEST = "0.3.75"
"""The oldest ComfyUI that this pack was tried with."""

EXPECTED = (
    Expected("comfy.model_patcher", "ModelPatcher.clone"),
    Expected("comfy.model_patcher", "ModelPatcher.__init__", ("model", "load_device", "offload_device", "size")),
    Expected("comfy.model_patcher", "ModelPatcher.add_wrapper_with_key", ("wrapper_type", "key", "wrapper")),
    Expected("comfy.model_patcher", "ModelPatcher.add_callback_with_key", ("call_type", "key", "callback")),
    Expected("comfy.model_patcher", "ModelPatcher.set_attachments"),
    Expected("comfy.patcher_extension", "WrappersMP.DIFFUSION_MODEL"),
    Expected("comfy.patcher_extension", "WrappersMP.OUTER_SAMPLE"),
    Expected("comfy.patcher_extension", "WrapperExecutor.__init__", ("original", "class_obj", "wrappers")),
    Expected("comfy.samplers", "CFGGuider.outer_sample"),
    Expected("comfy.model_management", "throw_exception_if_processing_interrupted"),
    Expected("comfy.model_management", "load_models_gpu", ("models",)),
    Expected("comfy.model_base", "BaseModel.get_dtype"),
    Expected("comfy.model_detection", "model_config_from_unet", ("state_dict", "unet_key_prefix", "metadata")),
    Expected("comfy.supported_models_base", "BASE.process_unet_state_dict", ("state_dict",)),
    Expected("comfy.supported_models_base", "BASE.get_model", ("state_dict", "prefix", "device")),
)


def problems(expected: Iterable[Expected]) -> list[str]:
    """What is not as expected, one line each."""
    return [problem for item in expected if (problem := item.problem()) is not None]


def pack_problem() -> str:
    """What the pack itself relies on; costs nothing at start-up. Empty when all is well."""
    return _message(problems(EXPECTED))


def require_supported(side: ComfySide) -> None:
    """A family may rely on more than this ComfyUI has; the others work all the same.

    Raises:
        PluginIncompatible: says what is missing.
    """
    message = _message(problems(side.expects))
    if message:
        raise PluginIncompatible(f"{side.adapter.family}: {message}")


def _message(found: list[str]) -> str:
    if not found:
        return ""
    return (
        f"This ComfyUI ({version()}) is not one that ComfyUI-Mesh was made for: {'; '.join(found)}. "
        f"Try: update both; this version was tried with ComfyUI {OLDEST}."
    )


@lru_cache(maxsize=1)
def version() -> str:
    """ComfyUI's, for messages."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return "of unknown version"
    return str(__version__)
