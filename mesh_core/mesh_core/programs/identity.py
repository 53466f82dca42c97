"""What a model is known by to the workers that are to run parts of it, whether it lies in files or in memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from mesh_codec.dtypes import from_safetensors
from mesh_core.host.options import ModelIdentity
from mesh_core.host.progress import THIS_MACHINE, Activity, Phase, ProgressReport
from mesh_core.model import fingerprint
from mesh_core.model.checkpoint import read_header
from mesh_core.model.library import Checkpoint, recognise
from mesh_core.plugins.registry import Plugins


def identify(checkpoint: Checkpoint, report: ProgressReport | None = None) -> ModelIdentity:
    """What the workers must hold to run ``checkpoint``. Reads all of its weights the first time."""

    def progress(done: int, total: int) -> None:
        if report is not None:
            report(Activity(THIS_MACHINE, Phase.CHECKING, done, total))

    spec = checkpoint.spec
    return ModelIdentity(
        spec, fingerprint.structure(spec), fingerprint.of_checkpoint(checkpoint.header, spec, progress)
    )


def identify_in_memory(
    checkpoint: Checkpoint, model: Any, plugins: Plugins, report: ProgressReport | None
) -> ModelIdentity:
    """The identity of a diffusers ``model`` in memory; that of its file when it was cast to another type on loading."""
    if checkpoint.header.path.is_dir() and checkpoint.header.files[0].is_file():
        return identify(checkpoint, report)
    spec = checkpoint.spec
    source = str(model.config.get("_name_or_path") or "")
    if source and Path(source).exists():
        on_disk = recognise(read_header(source), plugins)
        if on_disk.spec.dtypes != spec.dtypes:
            return identify(on_disk, report)
    return ModelIdentity(spec, fingerprint.structure(spec), fingerprint.of_model(spec, model))


def file_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type of most of a checkpoint's weights."""
    sizes: Counter[str] = Counter()
    for parameter in checkpoint.spec.parameters.values():
        sizes[parameter.dtype] += parameter.elements
    return from_safetensors(sizes.most_common(1)[0][0]).torch
