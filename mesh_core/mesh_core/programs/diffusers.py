"""The script host: a diffusers pipeline whose transformer is cut over machines.

The pipeline keeps its own transformer object, so everything else of the pipeline and of diffusers keeps working.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mesh_codec.qualities import EXACT, Quality
from mesh_core.builtin import installed_plugins
from mesh_core.errors import CheckpointMismatch, ConfigError, PlanDoesNotFit, PlanError
from mesh_core.host.loras import AnyLora
from mesh_core.host.options import ModelIdentity, SessionOptions
from mesh_core.host.progress import THIS_MACHINE, Activity, Phase, ProgressReport
from mesh_core.host.runner import Placement, SplitRunner, Workers, open_session, place
from mesh_core.host.session import Session
from mesh_core.model.adapter import Stage
from mesh_core.model.constructing import as_loaded
from mesh_core.model.library import Checkpoint
from mesh_core.model.numerics import Numerics, usual_numerics
from mesh_core.model.spans import BlockSpan
from mesh_core.model.tensors import stored_tensors
from mesh_core.model.weights import WeightReader
from mesh_core.plugins.registry import Plugins
from mesh_core.programs.identity import (
    CHANGED_HINT,
    changed_after_loading,
    file_dtype,
    identify,
    identify_in_memory,
)
from mesh_core.programs.in_memory import checkpoint_in_memory, hold_only, look_loaded, numerics_in_memory
from mesh_core.programs.loras import LoraChoice, chosen, give, refuse_what_is_not_here
from mesh_core.programs.peft_transfer import UnloadedLoras, loras_of, put_back, put_on_again, refuse_merging, take_off
from mesh_core.programs.pipeline_arguments import (
    DtypeChoice,
    Dtypes,
    dtype_choice,
    dtype_of_transformer,
)
from mesh_core.programs.pipeline_calls import guard, unwrap, wrap_again
from mesh_core.programs.pipeline_folder import (
    pipeline_arguments,
    pipeline_around,
    pipeline_checkpoint,
)
from mesh_core.programs.replaced_parts import offloading_hook, refuse_replaced_forward, refuse_replaced_parts
from mesh_core.programs.same_weights import checkpoint_of
from mesh_core.programs.split_model import SplitModel, attach, detach, model_of
from mesh_core.system.config import Settings
from mesh_core.system.device import checked_device, default_device, free_memory


@dataclass(frozen=True)
class _Wish:
    """What the user wants of one cut: which model, over which machines, and how."""

    checkpoint: Checkpoint
    local: str | None
    workers: Workers
    options: SessionOptions
    plugins: Plugins
    report: ProgressReport | None

    def chosen(self, loras: Sequence[LoraChoice]) -> tuple[AnyLora, ...]:
        """The LoRAs that were named; asks no worker.

        Raises:
            LoraError: one cannot be used, or it is not here and it is certain already that blocks run here.
        """
        spec = self.checkpoint.spec
        here = not self.workers if self.local is None else len(spec.span(self.local)) > 0
        return tuple(chosen(loras, self.checkpoint, self.options.settings, local=here))

    def placed(self, given: Sequence[AnyLora]) -> Placement:
        """Workers that are connected, and who runs what; nobody loads anything yet.

        Raises:
            LoraMissing: one of ``given`` is not here, and blocks are to run here.
            PlanError, TransportError: see `place`.
        """
        free = free_memory(self.options.device)
        placement = place(self.checkpoint, self.local, self.workers, self.plugins, self.options, free)
        try:
            if len(placement.plan.local):
                refuse_what_is_not_here(given, self.checkpoint, self.options.settings)
        except BaseException:
            placement.close()
            raise
        return placement


@dataclass(frozen=True)
class _Loading:
    """How the components besides the transformer are loaded: their type, and arguments of ``from_pretrained``."""

    dtype: Dtypes
    arguments: Mapping[str, Any]

    @property
    def transformer(self) -> torch.dtype:
        """In which the transformer computes."""
        return dtype_of_transformer(self.dtype)


def load_pipeline(
    path: str | Path,
    *,
    local: str | None = None,
    workers: Workers = (),
    quality: Quality = EXACT,
    codec: str | None = None,
    loras: Sequence[LoraChoice] = (),
    device: torch.device | str | None = None,
    dtype: DtypeChoice | None = None,
    torch_dtype: DtypeChoice | None = None,
    variant: str | None = None,
    components: str | Path | None = None,
    plugins: Plugins | None = None,
    settings: Settings | None = None,
    report: ProgressReport | None = None,
    **others: Any,
) -> Any:
    """A diffusers pipeline, with only the local blocks of its transformer read on this machine.

    Args:
        path: a folder that diffusers saved (with ``model_index.json``), or a transformer in a single file
            (.safetensors or .gguf, quantised or not) with the folder of the rest in ``components``.
        local: the host's span, for example ``":12"``, ``":0"`` (nothing) or ``":"`` (everything); None to have the
            cut proposed from what the machines have free.
        workers: addresses in execution order; ``(address, span)`` to say what one runs.
        quality: a name of `mesh_codec.qualities`; ``lossless`` is bit-exact.
        codec: by name, for the state between machines; None for the one that is fastest at that quality.
        loras: files or names, or pairs of one and a strength; see `set_loras`.
        device: for the whole pipeline; by default CUDA where there is one.
        dtype: in which the pipeline computes, here and on the workers; by default that of the transformer's file.
        torch_dtype: the same, as diffusers called it.
        variant: of the weights, for example ``"fp16"``.
        components: the folder of the pipeline that a single file belongs to.
        report: called with an `Activity` while stages load.
        others: as ``DiffusionPipeline.from_pretrained`` takes them, see `mesh_core.programs.pipeline_arguments`.

    Raises:
        ConfigError, CheckpointError, PlanError, TransportError, PluginError: see their hints.
    """
    plugins, settings = plugins or installed_plugins(), settings or Settings.load()
    checkpoint = pipeline_checkpoint(path, plugins, variant, others, components)
    named = {**others, "variant": variant} if variant else others
    arguments = pipeline_arguments(checkpoint.header, named, inspect.signature(load_pipeline).parameters)
    loading = _Loading(dtype_choice(dtype, torch_dtype) or file_dtype(checkpoint), arguments)
    target = checked_device(str(device)) if device is not None else default_device()
    numerics = _as_loaded(checkpoint, loading.transformer, target, plugins)
    options = SessionOptions(numerics, target, quality, settings, codec)
    wish = _Wish(checkpoint, local, workers, options, plugins, report)
    return _load(wish, wish.chosen(loras), loading)


def _as_loaded(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, plugins: Plugins) -> Numerics:
    """In what ``from_pretrained`` has a model compute."""
    usual = usual_numerics(checkpoint.spec, dtype, device, plugins.weight_formats())
    return as_loaded(usual, lambda: checkpoint.adapter.skeleton(checkpoint.spec))


def _load(wish: _Wish, given: tuple[AnyLora, ...], loading: _Loading) -> Any:
    placement = wish.placed(given)
    checkpoint, options = wish.checkpoint, wish.options
    session = open_session(lambda: identify(checkpoint, wish.report), placement, options, wish.plugins, wish.report)
    try:
        stage = _read_stage(wish, placement.plan.local)
        look_loaded(stage.model, checkpoint, options.numerics)
        runner = SplitRunner(checkpoint, placement.plan, stage, session, options.numerics)
        attach(stage.model, runner, options.device, options.numerics)
        pipeline = pipeline_around(stage.model, checkpoint.header, loading.dtype, loading.arguments)
        pipeline = pipeline.to(options.device)
        guard(pipeline)
        if given:
            give(pipeline.transformer, given)
        return pipeline
    except BaseException:
        placement.close()
        raise


def _read_stage(wish: _Wish, span: BlockSpan) -> Stage:
    weights = WeightReader(wish.checkpoint.header, progress=_local_progress(wish.report))
    adapter, options = wish.checkpoint.adapter, wish.options
    return adapter.build_stage(wish.checkpoint.spec, span, weights, device=options.device, numerics=options.numerics)


def split(
    pipeline: Any,
    *,
    local: str | None = None,
    workers: Workers = (),
    quality: Quality = EXACT,
    codec: str | None = None,
    loras: Sequence[LoraChoice] | None = None,
    source: str | Path | None = None,
    plugins: Plugins | None = None,
    settings: Settings | None = None,
    report: ProgressReport | None = None,
) -> Any:
    """Cut the transformer of a pipeline that is already loaded, or cut it anew; returns the pipeline.

    Blocks that run remotely are moved to the CPU until `unsplit`, so that they free the device's memory; those of a
    pipeline from `load_pipeline` are dropped, and read when they become local. Workers load or free only the
    difference. LoRAs that diffusers loaded stay. When this fails, the pipeline is as it was. Arguments as for
    `load_pipeline`; ``loras`` left out keeps those that it has. ``source`` is the single file that the transformer was
    loaded from: diffusers forgets it, and may have cast a part of it. It is compared bit by bit.
    """
    plugins, settings = plugins or installed_plugins(), settings or Settings.load()
    model = _transformer_of(pipeline)
    old = model.mesh if isinstance(model, SplitModel) else None
    if old is None:
        refuse_replaced_forward(model)
    taken = take_off(pipeline) if old is None else UnloadedLoras()
    try:
        checkpoint = checkpoint_of(old) if old is not None else checkpoint_in_memory(model, plugins, source)
        device = _running_device(model)
        numerics = usual_numerics(checkpoint.spec, model.dtype, device, plugins.weight_formats())
        numerics = numerics_in_memory(numerics, model, checkpoint)
        options = SessionOptions(numerics, device, quality, settings, codec)
        wish = _Wish(checkpoint, local, workers, options, plugins, report)
        wanted = model._mesh_loras if isinstance(model, SplitModel) else loras_of(taken, checkpoint, model)
        if loras is not None:
            wanted = replace(wanted, given=wish.chosen(loras))
        placement = wish.placed(wanted.given)
        session = _prepared(model, wish, placement, wanted.in_use(), old)
    except BaseException:
        put_back(pipeline, taken)
        raise
    stage = checkpoint.adapter.stage(checkpoint.spec, placement.plan.local, model)
    runner = SplitRunner(checkpoint, placement.plan, stage, session, options.numerics)
    attach(model, runner, torch.device(model.device), options.numerics, wanted)
    unwrap(pipeline)
    guard(pipeline)
    runner.set_loras(wanted.in_use())
    if old is not None:
        old.close()
    return pipeline


def _prepared(
    model: Any, wish: _Wish, placement: Placement, loras: Sequence[AnyLora], old: SplitRunner | None
) -> Session | None:
    """Have every machine hold its blocks, the workers theirs with ``loras``; the session, None if nothing is remote."""
    try:
        refuse_replaced_parts(model, wish.checkpoint, placement.plan.local)
    except BaseException:
        placement.close()
        raise
    session = _session(model, wish, placement, old)
    try:
        if session is not None:
            session.set_loras(loras)
        if old is not None:
            old.restore_local()
        hold_only(model, wish.checkpoint, placement.plan.local, torch.device(model.device), wish.options.numerics)
    except BaseException:
        if session is not None:
            session.close()
        raise
    return session


def _session(model: Any, wish: _Wish, placement: Placement, old: SplitRunner | None) -> Session | None:
    """An open session; that of ``old`` makes room when a worker cannot hold both."""
    checkpoint, plugins = wish.checkpoint, wish.plugins
    held = {**stored_tensors(model), **(old.untouched if old is not None else {})}
    remote = {name for hop in placement.plan.remote for name in checkpoint.spec.parameters_of(hop.span)}

    def identity() -> ModelIdentity:
        return identify_in_memory(checkpoint, held, remote, plugins, wish.report)

    try:
        return open_session(identity, placement, wish.options, wish.plugins, wish.report)
    except CheckpointMismatch as error:
        why = changed_after_loading(checkpoint, held, remote, plugins)
        if not why:
            raise
        raise CheckpointMismatch(f"{error.message} {why}", hint=CHANGED_HINT) from error
    except PlanDoesNotFit:
        if old is None:
            raise
        old.close()
        return open_session(identity, placement, wish.options, wish.plugins, wish.report)


def unsplit(pipeline: Any) -> Any:
    """Undo `split`: the pipeline runs on this machine alone again. Returns the pipeline.

    Remote blocks that were never read on this machine are read now. LoRAs that diffusers' own calls loaded stay;
    those of ``loras=`` and `set_loras` end with the split.

    Raises:
        UnsupportedInput: LoRAs are fused, and weights are not stored as their numbers; the pipeline stays split.
    """
    model = _transformer_of(pipeline)
    if isinstance(model, SplitModel):
        runner, device, numerics, loras = model.mesh, model.device, model._mesh_numerics, model._mesh_loras
        whole = BlockSpan(0, runner.checkpoint.spec.blocks)
        refuse_merging(loras)
        runner.restore_local()
        hold_only(model, checkpoint_of(runner), whole, device, numerics)
        runner.close()
        detach(model)
        wrap_again(pipeline)
        model.to(device)
        put_on_again(model, loras)
    return pipeline


def _transformer_of(pipeline: Any) -> Any:
    """Raises ConfigError where there is none."""
    model = model_of(pipeline)
    if model is None:
        raise ConfigError(
            f"A {type(pipeline).__name__} holds no transformer that could be split.",
            hint="a pipeline of diffusers that has one",
        )
    return model


def _running_device(model: Any) -> torch.device:
    """Where the blocks compute; not where they are, while they are offloaded."""
    return torch.device(getattr(offloading_hook(model), "execution_device", None) or model.device)


def stats(pipeline: Any) -> Any:
    """What the steps of a split pipeline cost: a `RunStats`.

    Raises:
        PlanError: the pipeline is not split.
    """
    model = _transformer_of(pipeline)
    if not isinstance(model, SplitModel):
        raise PlanError("This pipeline is not split.", hint="mesh_core.split(pipeline, ...)")
    return model.mesh.stats


def _local_progress(report: ProgressReport | None) -> Any:
    if report is None:
        return None
    return lambda done, total: report(Activity(THIS_MACHINE, Phase.LOADING, done, total))
