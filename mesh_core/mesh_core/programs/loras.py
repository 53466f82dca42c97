"""LoRAs of the script host: from what a user writes to what a runner takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mesh_core.errors import LoraMissing, PlanError
from mesh_core.host.loras import AnyLora, Borrowed
from mesh_core.loras.library import own_library
from mesh_core.loras.lora import Applied
from mesh_core.loras.read import read_lora, warn_of_unmatched
from mesh_core.model.library import Checkpoint
from mesh_core.programs.split_model import SplitModel, model_of
from mesh_core.system.config import Settings

LoraChoice = str | Path | tuple[str | Path, float]
"""A file, the name of one of this machine's or the workers' LoRAs, or the start of its hash; with its strength."""


def chosen(loras: Sequence[LoraChoice], checkpoint: Checkpoint, settings: Settings, *, local: bool) -> list[AnyLora]:
    """What ``loras`` names.

    Args:
        local: whether blocks run on this machine, for which the LoRA must be here. Where that is not known yet, False,
            and `refuse_what_is_not_here` once it is.

    Raises:
        LoraMissing: a path at which there is no file; or neither a file nor a name that this machine knows, and blocks
            run here.
        LoraError: see `read_lora`.
    """
    library = own_library(settings)
    found: list[AnyLora] = []
    for item in loras:
        source, strength = item if isinstance(item, tuple) else (item, 1.0)
        file = Path(source).expanduser()
        if file.is_file():
            found.append(Applied(warn_of_unmatched(read_lora(file, checkpoint)), float(strength)))
            continue
        if isinstance(source, Path) or file.is_absolute() or str(source).startswith("."):
            raise LoraMissing(
                f"{file} is a folder, and no LoRA." if file.is_dir() else f"There is no file {file}.",
                hint="the path of a .safetensors file, or a name that mesh lora list shows",
            )
        try:
            lora = library.named(str(source), checkpoint, checkpoint.spec.parameters)
            found.append(Applied(warn_of_unmatched(lora), float(strength)))
        except LoraMissing as error:
            if local:
                raise LoraMissing(
                    f"There is no file {str(source)[:200]!r}. {error.message}", hint=error.hint
                ) from error
            found.append(Borrowed(str(source), float(strength)))
    return found


def refuse_what_is_not_here(loras: Sequence[AnyLora], checkpoint: Checkpoint, settings: Settings) -> None:
    """For blocks that run on this machine after all.

    Raises:
        LoraMissing: one of ``loras`` is left to workers, and this machine does not know it.
    """
    library = own_library(settings)
    for lora in loras:
        if isinstance(lora, Borrowed):
            library.named(lora.name, checkpoint, ())


def set_loras(pipeline: Any, loras: Sequence[LoraChoice]) -> Any:
    """Give a split pipeline exactly ``loras``, beside those that diffusers' own calls loaded. Returns the pipeline.

    A changed strength, order or set is merged anew on every machine, without loading the model again; a worker is
    sent only what it lacks.

    Raises:
        PlanError: the pipeline is not split.
        LoraError and its kinds: one cannot be read, sent or used; the pipeline has the LoRAs that it had.
    """
    model = model_of(pipeline)
    if not isinstance(model, SplitModel):
        raise PlanError("This pipeline is not split.", hint="pipe.load_lora_weights(...), or mesh_core.split first")
    runner = model.mesh
    settings = runner.session.options.settings if runner.session is not None else Settings.load()
    given = chosen(loras, runner.checkpoint, settings, local=bool(len(runner.plan.local)))
    give(model, given)
    return pipeline


def give(model: SplitModel, loras: Sequence[AnyLora]) -> None:
    """Have a split transformer use exactly ``loras`` beside those of diffusers' calls; as it was when that fails."""
    model._mesh_change(lambda known: setattr(known, "given", tuple(loras)))
