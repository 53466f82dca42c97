"""The folder of a diffusers pipeline: what it holds, whether it can make what is asked of it, and loading it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from mesh_core.builtin import installed_plugins
from mesh_core.errors import ConfigError
from mesh_core.model.checkpoint import CheckpointHeader, read_header
from mesh_core.model.library import recognise
from mesh_core.plugins.registry import Plugins


def pipeline_header(path: str | Path) -> CheckpointHeader:
    """The header of the transformer in a pipeline's folder.

    Raises:
        ConfigError: a single file, or a folder that holds no ``model_index.json``.
        CheckpointError: see `read_header`.
    """
    header = read_header(path)
    if not header.pipeline and Path(path).is_file():
        raise ConfigError(
            f"{path} is a single file, which holds a transformer alone; text encoders and VAE are needed here too.",
            hint="the folder of a whole pipeline, saved by diffusers; a single file can be served, inspected, and in a "
            "script be loaded into a pipeline for split()",
        )
    if not header.pipeline:
        raise ConfigError(
            f"{path} is not a pipeline folder: it has no model_index.json.",
            hint="the folder that holds transformer/, vae/ and text_encoder/, or split() on a pipeline of your own",
        )
    return header


def check_call(path: str | Path, arguments: Mapping[str, Any], plugins: Plugins | None = None) -> type[Any]:
    """Refuse what the pipeline in the folder ``path`` cannot make, before any weight is read; returns its class.

    Args:
        arguments: of the pipeline's call, as far as the user set them.

    Raises:
        ConfigError: an argument that the model does not accept, or a pipeline that diffusers does not have.
        CheckpointError: its transformer is none of an installed family.
    """
    header = pipeline_header(path)
    checkpoint = recognise(header, plugins or installed_plugins())
    checkpoint.adapter.check_call(checkpoint.spec, header, arguments)
    return _class_of(header)


def pipeline_around(model: Any, header: CheckpointHeader, dtype: torch.dtype, arguments: Mapping[str, Any]) -> Any:
    """The pipeline in a folder with ``model`` for its transformer.

    Args:
        arguments: of ``from_pretrained``.

    Raises:
        ConfigError: a pipeline that diffusers does not have, or one that takes another transformer.
    """
    import diffusers

    custom = "custom_pipeline" in arguments or not isinstance(header.pipeline.get("_class_name"), str)
    # The class itself: the general one passes over components that the class has a default for.
    kind = diffusers.DiffusionPipeline if custom else _class_of(header)
    # Renamed in diffusers 0.42.
    typed = {"dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype": dtype}
    pipeline = kind.from_pretrained(str(header.path), transformer=model, **typed, **arguments)
    if getattr(pipeline, "transformer", None) is not model:
        raise ConfigError(
            f"{type(pipeline).__name__} does not use the transformer that it is given, so it would not be split.",
            hint="split() on the loaded pipeline",
        )
    return pipeline


def _class_of(header: CheckpointHeader) -> type[Any]:
    """The class that ``model_index.json`` names. Raises ConfigError if diffusers does not have it."""
    import diffusers

    name = header.pipeline.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
        raise ConfigError(
            f"diffusers {diffusers.__version__} has no pipeline {str(name)[:80]!r}.", hint="pip install -U diffusers"
        )
    return found
