"""One picture or video from a prompt, over several machines, into a file: what ``mesh generate`` does."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mesh_core.builtin import installed_plugins
from mesh_core.crossing.stats import RunStats
from mesh_core.programs import media
from mesh_core.programs.diffusers import load_pipeline, stats
from mesh_core.programs.pipeline_folder import check_call


def generate(
    model: Path, prompt: str, wanted: Mapping[str, Any], *, seed: int, output: Path | None, **split: Any
) -> tuple[Path, RunStats]:
    """Load the pipeline ``model``, call it once, and write what it made.

    Args:
        wanted: arguments of the pipeline's call that the user set; the others are as the model's authors recommend.
        output: the file; None for ``out.png`` or ``out.mp4``, by what the pipeline makes.
        split: as `load_pipeline` takes it.

    Returns:
        The file, and what each step cost.

    Raises:
        PluginError: the codec is none, or cannot be used.
        ConfigError: something that the pipeline cannot make, or a file that cannot be written; before weights are read.
        MeshError: as `load_pipeline`.
    """
    if (codec := split.get("codec")) is not None:
        (split.get("plugins") or installed_plugins()).codec(codec)
    kind = check_call(model, wanted, variant=split.get("variant"), components=split.get("components"))
    file = media.checked_output(output, kind)
    pipeline = load_pipeline(model, **split)
    try:
        checkpoint = pipeline.transformer.mesh.checkpoint
        arguments = {**checkpoint.adapter.recommended(checkpoint.spec, checkpoint.header), **wanted}
        known = inspect.signature(pipeline.__call__).parameters
        arguments = {name: value for name, value in arguments.items() if name in known}
        made = pipeline(prompt=prompt, generator=torch.Generator("cpu").manual_seed(seed), **arguments)
        media.save(pipeline, made, wanted, file)
        return file, stats(pipeline)
    finally:
        pipeline.transformer.mesh.close()
