"""Arguments of ``from_pretrained`` as `load_pipeline` takes them: each means what it says, or is refused by name.

The transformer is read here, from a folder, and only as much of it as this machine runs. So what says how a whole model
is to be fetched, placed or rewritten cannot hold for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

import torch

from mesh_core.errors import ConfigError

DtypeChoice = torch.dtype | str | Mapping[str, torch.dtype | str]
"""A type, its name (``"bfloat16"``), or as in diffusers one for each component and ``default`` for the others."""

Dtypes = torch.dtype | Mapping[str, torch.dtype]

_COMPUTED = (torch.bfloat16, torch.float16, torch.float32)
_PLACED = "device= for all that runs here, and local= and workers= for the blocks of the transformer"
_FOLDER = "the folder of the download, for example: hf download OWNER/MODEL --revision R --local-dir models/x"
_SAFETENSORS = "the folder with .safetensors files; nothing else is read"

REFUSED: Mapping[str, str] = {
    "transformer": "split() on a pipeline that was loaded with that transformer",
    "subfolder": "the folder itself as the path",
    "revision": _FOLDER,
    "force_download": _FOLDER,
    "mirror": _FOLDER,
    "dduf_file": _FOLDER,
    "device_map": _PLACED,
    "max_memory": _PLACED,
    "offload_folder": _PLACED,
    "offload_state_dict": _PLACED,
    "output_loading_info": "load_pipeline without it; what is missing or damaged is an error",
    "load_connected_pipeline": "each pipeline loaded by itself",
    "use_onnx": _SAFETENSORS,
    "use_flashpack": _SAFETENSORS,
    "provider": _SAFETENSORS,
    "provider_options": _SAFETENSORS,
    "sess_options": _SAFETENSORS,
}
"""What `load_pipeline` does not do, unless it is None or False, and what to do in its place."""

PASSED = (
    "variant",
    "custom_pipeline",
    "custom_revision",
    "trust_remote_code",
    "local_files_only",
    "cache_dir",
    "proxies",
    "token",
    "use_safetensors",
    "low_cpu_mem_usage",
    "disable_mmap",
    "quantization_config",
)
"""What holds for the other components; ``variant`` for the transformer too. Nothing is downloaded in any case."""


def accepted(
    given: Mapping[str, Any], pipeline_class: type[Any] | None, similar: Collection[str] = ()
) -> dict[str, Any]:
    """Those of ``given`` that ``from_pretrained`` is called with.

    Args:
        pipeline_class: whose own arguments are accepted too; None where it is not known yet.
        similar: names that a misspelt one may have meant.

    Raises:
        ConfigError: one that `load_pipeline` does not do, or that nobody knows; names it.
    """
    for name, hint in REFUSED.items():
        if given.get(name) is not None and given[name] is not False:
            raise ConfigError(f"load_pipeline does not take {name}={_shown(given[name])}.", hint=hint)
    if given.get("use_safetensors") is False:
        raise ConfigError("load_pipeline does not take use_safetensors=False: pickles are not read.", hint=_SAFETENSORS)
    if _quantises_transformer(given.get("quantization_config")):
        raise ConfigError(
            "quantization_config quantises the transformer, whose blocks workers compute with as the file has them.",
            hint="quant_mapping or components_to_quantize with other components, for example text_encoder",
        )
    kept = {name: value for name, value in given.items() if name not in REFUSED}
    if pipeline_class is not None:
        own = [name for name in inspect.signature(pipeline_class.__init__).parameters if name != "self"]
        for name in kept.keys() - {*PASSED, *own}:
            close = get_close_matches(name, [*PASSED, *own, *similar], n=1)
            raise ConfigError(
                f"Neither load_pipeline nor {pipeline_class.__name__} has an argument {name[:80]!r}.",
                hint=close[0] if close else f"components of the pipeline ({', '.join(own)}) or {', '.join(PASSED)}",
            )
    return kept


def dtype_choice(dtype: DtypeChoice | None, torch_dtype: DtypeChoice | None) -> Dtypes | None:
    """``dtype`` under either of its names in diffusers, with types for names of types.

    Raises:
        ConfigError: what is no type, one for the transformer that no machine computes in, or two that differ.
    """
    found = [_types(each) for each in (dtype, torch_dtype) if each is not None]
    if found and found[0] != found[-1]:
        raise ConfigError(
            f"dtype={dtype} and torch_dtype={torch_dtype} are the same argument, and differ.", hint="one of them"
        )
    if found and dtype_of_transformer(found[0]) not in _COMPUTED:
        raise ConfigError(f"dtype={found[0]}: workers do not compute in it.", hint="bfloat16, float16 or float32")
    return found[0] if found else None


def dtype_of_transformer(choice: Dtypes) -> torch.dtype:
    """In which the transformer computes, on all machines."""
    return (
        choice if isinstance(choice, torch.dtype) else choice.get("transformer", choice.get("default", torch.float32))
    )


def _types(choice: DtypeChoice) -> Dtypes:
    if isinstance(choice, Mapping):
        return {name: _type(each) for name, each in choice.items()}
    return _type(choice)


def _type(choice: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, choice.removeprefix("torch."), None) if isinstance(choice, str) else choice
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype={_shown(choice)} is no type of torch.", hint="torch.bfloat16 or 'bfloat16'")
    return found


def _quantises_transformer(config: Any) -> bool:
    if config is None:
        return False
    mapping, names = (getattr(config, name, None) for name in ("quant_mapping", "components_to_quantize"))
    chosen = [*(mapping or ()), *([names] if isinstance(names, str) else names or ())]
    return not chosen or "transformer" in chosen


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, (str, bool, int, torch.dtype)) else f"a {type(value).__name__}"
