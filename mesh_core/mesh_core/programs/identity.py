"""What a model is known by to the workers that are to run parts of it, whether it lies in files or in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mesh_codec.dtypes import from_safetensors
from mesh_core.errors import CheckpointError, CheckpointMismatch
from mesh_core.host.options import ModelIdentity
from mesh_core.host.progress import THIS_MACHINE, Activity, Phase, ProgressReport
from mesh_core.model import fingerprint
from mesh_core.model.checkpoint import read_header
from mesh_core.model.library import Checkpoint, recognise, variants_at
from mesh_core.plugins.registry import Plugins
from mesh_core.programs.held_weights import as_stored
from mesh_core.programs.same_weights import first_difference, fits
from mesh_core.system.logs import logger

log = logger(__name__)

CHANGED_HINT = "the changed model saved to a folder that the workers serve too; LoRAs through loras=, not fused"


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
    checkpoint: Checkpoint,
    held: Mapping[str, Tensor],
    remote: Collection[str],
    plugins: Plugins,
    report: ProgressReport | None,
) -> ModelIdentity:
    """The identity of a diffusers model in memory: by its content, or by its file's where that is the same.

    A file says nothing of what became of its weights after loading. It is taken for the model only where every
    parameter that workers would read from it equals the one in memory, see `first_difference`.

    Args:
        held: all parameters by name; those that were never read have no data.
        remote: names of those that workers are to compute with.

    Raises:
        CheckpointMismatch: only a part is in memory, and one that was changed there is to run on a worker.
        CheckpointError: the file cannot be read, or is not the one that it was.
    """
    if checkpoint.header.stamps:
        changed = first_difference(checkpoint, held, remote)
        if changed is not None:
            raise CheckpointMismatch(_changed(changed, checkpoint), hint=CHANGED_HINT)
        return identify(checkpoint, report)
    spec = checkpoint.spec
    held = {name: as_stored(name, tensor, plugins) for name, tensor in held.items()}
    for on_disk in _on_disk(checkpoint, plugins):
        cast = fingerprint.structure(on_disk.spec) != fingerprint.structure(spec)
        if cast and first_difference(on_disk, held, remote) is None:
            return identify(on_disk, report)
    content = fingerprint.of_values(spec, held.__getitem__)
    return ModelIdentity(spec, fingerprint.structure(spec), content)


def changed_after_loading(
    checkpoint: Checkpoint, held: Mapping[str, Tensor], remote: Collection[str], plugins: Plugins
) -> str:
    """Which of the parameters for workers is not what the file of a model in memory holds; empty if none is known."""
    told = ""
    for on_disk in _on_disk(checkpoint, plugins):
        changed = first_difference(on_disk, held, remote)
        if changed is None:
            return ""
        told = told or _changed(changed, on_disk)
    return told


def _changed(name: str, checkpoint: Checkpoint) -> str:
    return f"{name} is not what {checkpoint.header.path} holds: it was changed in memory (fused, scaled, quantised)."


def _on_disk(checkpoint: Checkpoint, plugins: Plugins) -> Iterator[Checkpoint]:
    """What a model in memory may have been loaded from, as far as it says and as far as that fits: each variant."""
    source = str(checkpoint.header.config.get("_name_or_path") or "")
    if not source or not Path(source).exists():
        return
    try:
        for variant in variants_at(Path(source)):
            found = recognise(read_header(source, variant=variant), plugins)
            if fits(found, checkpoint):
                yield found
    except CheckpointError as error:
        log.debug("the weights in memory are not looked for in %s: %s", source, error)


def file_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type of most of a checkpoint's weights; stored ones are computed with in bfloat16."""
    sizes: Counter[str] = Counter()
    for parameter in checkpoint.spec.parameters.values():
        sizes["BF16" if parameter.in_a_format else parameter.dtype] += parameter.elements
    return from_safetensors(sizes.most_common(1)[0][0]).torch
