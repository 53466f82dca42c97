"""The script host: a diffusers pipeline whose transformer is cut over machines.

The pipeline keeps its own transformer object, so everything else of the pipeline and of diffusers keeps working.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from mesh_codec.base import Quality
from mesh_codec.dtypes import from_safetensors, from_torch
from mesh_core.builtin import installed_plugins
from mesh_core.errors import ConfigError, PlanDoesNotFit, PlanError
from mesh_core.host.options import ModelIdentity, SessionOptions
from mesh_core.host.progress import THIS_MACHINE, Activity, Phase, ProgressReport
from mesh_core.host.runner import SplitRunner, Workers, open_session, place
from mesh_core.host.session import Session
from mesh_core.model import fingerprint
from mesh_core.model.checkpoint import CheckpointHeader, read_header
from mesh_core.model.library import Checkpoint, recognise
from mesh_core.model.safetensors import TensorInfo
from mesh_core.model.spans import BlockSpan
from mesh_core.model.weights import WeightReader, assign
from mesh_core.plugins.registry import Plugins
from mesh_core.programs.loras import LoraChoice, adapters_of, chosen, put_back, put_on, set_loras, take_off
from mesh_core.programs.split_model import SplitModel, attach, detach
from mesh_core.system.config import Settings
from mesh_core.system.device import checked_device, default_device, free_memory

_MEMORY = Path("(weights in memory)")
"""Stands for the file of a model that was loaded by somebody else."""


def load_pipeline(
    path: str | Path,
    *,
    local: str | None = None,
    workers: Workers = (),
    quality: Quality = "lossless",
    codec: str | None = None,
    loras: Sequence[LoraChoice] = (),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    plugins: Plugins | None = None,
    settings: Settings | None = None,
    report: ProgressReport | None = None,
    **pipeline_arguments: Any,
) -> Any:
    """A diffusers pipeline from a folder, with only the local blocks of its transformer read on this machine.

    Args:
        path: a folder that diffusers saved (with ``model_index.json``).
        local: the host's span, for example ``":12"``, ``":0"`` (nothing) or ``":"`` (everything); None to have the
            cut proposed from what the machines have free.
        workers: addresses in execution order; ``(address, span)`` to say what one runs.
        quality: a name of `mesh_codec.qualities`; ``lossless`` is bit-exact.
        codec: by name, for the state between machines; None for the one that is fastest at that quality.
        loras: files or names, or pairs of one and a strength; see `set_loras`.
        device: for the whole pipeline; by default CUDA where there is one.
        dtype: in which the pipeline computes, here and on the workers; by default that of the transformer's file.
        report: called with an `Activity` while stages load.
        pipeline_arguments: passed on to ``DiffusionPipeline.from_pretrained``.

    Raises:
        CheckpointError, PlanError, TransportError, PluginError: see their hints.
    """
    from diffusers import DiffusionPipeline

    plugins, settings = plugins or installed_plugins(), settings or Settings.load()
    header = _pipeline_header(path)
    checkpoint = recognise(header, plugins)
    target = checked_device(str(device)) if device is not None else default_device()
    options = SessionOptions(dtype or file_dtype(checkpoint), target, quality, settings, codec)
    placement = place(checkpoint, local, workers, plugins, options, free_memory(target))
    session = open_session(lambda: identify(checkpoint, report), placement, options, plugins, report)
    try:
        weights = WeightReader(header, progress=_local_progress(report))
        stage = checkpoint.adapter.build_stage(
            checkpoint.spec, placement.plan.local, weights, device=target, dtype=options.dtype
        )
        runner = SplitRunner(checkpoint, placement.plan, stage, session)
        attach(stage.model, runner, target, options.dtype)
        pipeline = DiffusionPipeline.from_pretrained(
            str(path), transformer=stage.model, **{_dtype_name(): options.dtype}, **pipeline_arguments
        )
        pipeline = pipeline.to(target)
        return set_loras(pipeline, loras) if loras else pipeline
    except BaseException:
        placement.close()
        raise


def check_call(path: str | Path, arguments: Mapping[str, Any], plugins: Plugins | None = None) -> type[Any]:
    """Refuse what the pipeline in the folder ``path`` cannot make, before any weight is read; returns its class.

    Args:
        arguments: of the pipeline's call, as far as the user set them.

    Raises:
        ConfigError: an argument that the model does not accept, or a pipeline that diffusers does not have.
        CheckpointError: its transformer is none of an installed family.
    """
    import diffusers

    header = _pipeline_header(path)
    checkpoint = recognise(header, plugins or installed_plugins())
    checkpoint.adapter.check_call(checkpoint.spec, header, arguments)
    name = header.pipeline.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
        raise ConfigError(
            f"diffusers {diffusers.__version__} has no pipeline {str(name)[:80]!r}.", hint="pip install -U diffusers"
        )
    return found


def _pipeline_header(path: str | Path) -> CheckpointHeader:
    header = read_header(path)
    if not header.pipeline:
        raise ConfigError(
            f"{path} is not a pipeline folder: it has no model_index.json.",
            hint="the folder that holds transformer/, vae/ and text_encoder/, or split() on a pipeline of your own",
        )
    return header


def split(
    pipeline: Any,
    *,
    local: str | None = None,
    workers: Workers = (),
    quality: Quality = "lossless",
    codec: str | None = None,
    loras: Sequence[LoraChoice] | None = None,
    plugins: Plugins | None = None,
    settings: Settings | None = None,
    report: ProgressReport | None = None,
) -> Any:
    """Cut the transformer of a pipeline that is already loaded, or cut it anew; returns the pipeline.

    Blocks that run remotely are moved to the CPU until `unsplit`, so that they free the device's memory; those of a
    pipeline from `load_pipeline` are dropped, and read when they become local. Workers load or free only the
    difference. LoRAs that diffusers loaded stay. When this fails, the pipeline is as it was. Arguments as for
    `load_pipeline`; ``loras`` left out keeps those that it has.
    """
    plugins, settings = plugins or installed_plugins(), settings or Settings.load()
    model = pipeline.transformer
    old = model.mesh if isinstance(model, SplitModel) else None
    taken = take_off(pipeline) if old is None else []
    session: Session | None = None
    try:
        checkpoint = old.checkpoint if old is not None else _checkpoint_in_memory(model, plugins)
        device = torch.device(model.device)
        options = SessionOptions(model.dtype, device, quality, settings, codec)
        adapters = model._mesh_adapters if isinstance(model, SplitModel) else adapters_of(taken, checkpoint)
        placement = place(checkpoint, local, workers, plugins, options, free_memory(device))
        if loras is not None:
            given = chosen(loras, checkpoint, settings, local=bool(len(placement.plan.local)))
            adapters = replace(adapters, given=tuple(given))

        def identity() -> ModelIdentity:
            known = old.session.identity if old is not None and old.session is not None else None
            return known or _identify_loaded(checkpoint, pipeline, plugins, report)

        try:
            session = open_session(identity, placement, options, plugins, report)
        except PlanDoesNotFit:
            if old is None:
                raise
            old.close()
            session = open_session(identity, placement, options, plugins, report)
        if session is not None:
            session.set_loras(adapters.in_use())
        if old is not None:
            old.restore_local()
        _hold_only(model, checkpoint, placement.plan.local, device, options.dtype)
    except BaseException:
        if session is not None:
            session.close()
        put_back(pipeline, taken)
        raise
    stage = checkpoint.adapter.stage(checkpoint.spec, placement.plan.local, model)
    runner = SplitRunner(checkpoint, placement.plan, stage, session)
    attach(model, runner, device, options.dtype, adapters)
    runner.set_loras(adapters.in_use())
    if old is not None:
        old.close()
    return pipeline


def unsplit(pipeline: Any) -> Any:
    """Undo `split`: the pipeline runs on this machine alone again. Returns the pipeline.

    Remote blocks that were never read on this machine are read now. LoRAs that diffusers' own calls loaded stay;
    those of ``loras=`` and `set_loras` end with the split.
    """
    model = pipeline.transformer
    if isinstance(model, SplitModel):
        runner, device, dtype, adapters = model.mesh, model.device, model.dtype, model._mesh_adapters
        whole = BlockSpan(0, runner.checkpoint.spec.blocks)
        runner.restore_local()
        _hold_only(model, runner.checkpoint, whole, device, dtype)
        runner.close()
        detach(model)
        model.to(device)
        put_on(model, adapters)
    return pipeline


def stats(pipeline: Any) -> Any:
    """What the steps of a split pipeline cost: a `RunStats`.

    Raises:
        PlanError: the pipeline is not split.
    """
    model = pipeline.transformer
    if not isinstance(model, SplitModel):
        raise PlanError("This pipeline is not split.", hint="mesh_core.split(pipeline, ...)")
    return model.mesh.stats


def identify(checkpoint: Checkpoint, report: ProgressReport | None = None) -> ModelIdentity:
    """What the workers must hold to run ``checkpoint``. Reads all of its weights the first time."""

    def progress(done: int, total: int) -> None:
        if report is not None:
            report(Activity(THIS_MACHINE, Phase.CHECKING, done, total))

    spec = checkpoint.spec
    return ModelIdentity(
        spec, fingerprint.structure(spec), fingerprint.of_checkpoint(checkpoint.header, spec, progress)
    )


def file_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type of most of a checkpoint's weights."""
    sizes: Counter[str] = Counter()
    for parameter in checkpoint.spec.parameters.values():
        sizes[parameter.dtype] += parameter.elements
    return from_safetensors(sizes.most_common(1)[0][0]).torch


def _checkpoint_in_memory(model: nn.Module, plugins: Plugins) -> Checkpoint:
    tensors = {
        name: TensorInfo(name, from_torch(p.dtype).safetensors, tuple(p.shape), _MEMORY, 0, p.nbytes)
        for name, p in model.named_parameters()
    }
    config = {**model.config, "_class_name": type(model).__name__}  # type: ignore[dict-item]
    return recognise(CheckpointHeader(_MEMORY, tensors, config=config), plugins)


def _identify_loaded(
    checkpoint: Checkpoint, pipeline: Any, plugins: Plugins, report: ProgressReport | None
) -> ModelIdentity:
    """The identity of a model in memory; that of its file when it was cast to another type on loading."""
    if checkpoint.header.path.is_dir() and checkpoint.header.files[0].is_file():
        return identify(checkpoint, report)
    spec, model = checkpoint.spec, pipeline.transformer
    source = str(model.config.get("_name_or_path") or "")
    if source and Path(source).exists():
        on_disk = recognise(read_header(source), plugins)
        if on_disk.spec.dtypes != spec.dtypes:
            return identify(on_disk, report)
    return ModelIdentity(spec, fingerprint.structure(spec), fingerprint.of_model(spec, model))


def _hold_only(
    model: nn.Module, checkpoint: Checkpoint, span: BlockSpan, device: torch.device, dtype: torch.dtype
) -> None:
    """Have the parameters of ``span`` on the device, and the others off it."""
    wanted = checkpoint.spec.parameters_of(span)
    parameters = dict(model.named_parameters())
    missing = {name: spec for name, spec in wanted.items() if parameters[name].is_meta}
    if missing:
        WeightReader(checkpoint.header).fill(model, missing, device=device, dtype=dtype)
    header = checkpoint.header
    from_file = header.path != _MEMORY and all(file.is_file() for file in header.files)
    for name, parameter in parameters.items():
        if name in wanted and not parameter.is_meta:
            parameter.data = parameter.data.to(device)
        elif name not in wanted and from_file:
            assign(model, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
        elif name not in wanted:
            parameter.data = parameter.data.to("cpu")


def _dtype_name() -> str:
    """What ``from_pretrained`` calls the type to load in; renamed in diffusers 0.42."""
    import diffusers

    return "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"


def _local_progress(report: ProgressReport | None) -> Any:
    if report is None:
        return None
    return lambda done, total: report(Activity(THIS_MACHINE, Phase.LOADING, done, total))
