"""Cuts a model: from a patcher and what the user chose in the node to a patcher whose remote blocks run on workers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management
import torch

from mesh_codec.errors import CodecError
from mesh_core.errors import CheckpointMismatch, MeshError, PlanDoesNotFit, PlanError
from mesh_core.host.options import ModelIdentity, SessionOptions
from mesh_core.host.progress import Activity
from mesh_core.host.runner import Placement, Workers, place
from mesh_core.host.session import Session
from mesh_core.model.numerics import usual_numerics

from .arithmetic import numerics_of
from .compatibility import require_supported
from .cut import cut_at
from .identity import recognised
from .node_settings import SplitSettings
from .pack_state import PackState
from .partial_model import nbytes, partial_copy
from .patching import KEY, raise_if_interrupted
from .split import Split, attach
from .status import NodeState
from .weight_source import UNREAD, LoadedModel, WeightSource


def cut_model(patcher: Any, wanted: SplitSettings, pack: PackState, node: str) -> Any:
    """The model of ``patcher``, split; the node shows what became of it.

    Raises:
        MeshError, CodecError: with what to do; ``patcher`` is as it was.
    """
    try:
        return _cut(patcher, wanted, pack, node)
    except (MeshError, CodecError) as error:
        pack.status.fail(node, error)
        raise


def _cut(patcher: Any, wanted: SplitSettings, pack: PackState, node: str) -> Any:
    if patcher.get_attachment(KEY) is not None:
        raise PlanError(
            "This model is split already.", hint="one Mesh Split per model; Mesh Workers for several workers"
        )
    source = _weight_source(patcher, pack)
    require_supported(source.side)
    spec = source.checkpoint.spec
    if wanted.local is not None and wanted.local > spec.blocks:
        raise PlanError(
            f"This model ({spec.family} {spec.variant}) has {spec.blocks} blocks; {wanted.local} cannot run here.",
            hint=f"local_blocks from 0 to {spec.blocks}, or -1 to have it proposed",
        )
    if wanted.local == spec.blocks:
        return _all_here(patcher, source, pack, node)
    settings, device = wanted.of_session(), torch.device(patcher.load_device)
    numerics = numerics_of(source.checkpoint, patcher.model, _compute_type(patcher), device, pack.weight_formats())
    options = SessionOptions(numerics, device, wanted.quality, settings, watch=raise_if_interrupted)
    placement = _place(source, wanted, pack, options, device)
    if not placement.remotes:
        placement.close()
        return _all_here(patcher, source, pack, node)
    local = placement.plan.local.stop
    reached = [{"name": r.welcome.name, "address": r.address.text, "span": str(h.span)} for r, h in _pairs(placement)]
    pack.status.start(node, reached, spec.blocks, local)
    session = _opened(source, placement, options, pack, node)
    pack.keep(node, session)
    split = Split(pack, node, source, cut_at(source, local), session, wanted.on_failure, weakref.WeakSet())
    result = attach(patcher, _local_part(patcher, source, local, pack, node), split)
    pack.status.change(node, NodeState.CONNECTED)
    return result


def _all_here(patcher: Any, source: WeightSource, pack: PackState, node: str) -> Any:
    blocks = source.checkpoint.spec.blocks
    pack.close(node)
    pack.status.start(node, (), blocks, blocks)
    pack.status.change(node, NodeState.LOCAL, "All blocks run here.")
    if isinstance(source, LoadedModel):
        return patcher
    return attach(patcher, _local_part(patcher, source, blocks, pack, node), None)


def _weight_source(patcher: Any, pack: PackState) -> WeightSource:
    file: WeightSource | None = patcher.get_attachment(UNREAD)
    if file is not None:
        return file
    checkpoint, side = recognised(patcher.model, pack.plugins)
    return LoadedModel(patcher, checkpoint, side)


def _local_part(patcher: Any, source: WeightSource, local: int, pack: PackState, node: str) -> Callable[[], Any]:
    """Makes copies of the model with the blocks that are here."""

    def make() -> Any:
        model = partial_copy(patcher.model, source.weights(local))
        pack.status.holds(node, nbytes(model.diffusion_model), source.bytes_read)
        return model

    return make


def _compute_type(patcher: Any) -> torch.dtype:
    cast: torch.dtype | None = patcher.get_model_object("manual_cast_dtype")
    dtype: torch.dtype = cast if cast is not None else patcher.model.get_dtype()
    return dtype


def _place(
    source: WeightSource, wanted: SplitSettings, pack: PackState, options: SessionOptions, device: torch.device
) -> Placement:
    spec = source.checkpoint.spec
    local = None if wanted.local is None else f":{wanted.local}"
    free = comfy.model_management.get_total_memory(device)
    return place(source.checkpoint, local, _spans(spec.blocks, wanted), pack.plugins, options, free)


def _spans(blocks: int, wanted: SplitSettings) -> Workers:
    """Workers with the spans that follow from how many blocks each was given; the last one runs to the end."""
    if wanted.local is None or all(worker.blocks is None for worker in wanted.workers):
        return [worker.address for worker in wanted.workers]
    spans: list[tuple[str, str]] = []
    start = wanted.local
    for index, worker in enumerate(wanted.workers):
        last = index == len(wanted.workers) - 1
        if not last and worker.blocks is None:
            raise PlanError(
                f"How many blocks {worker.address} runs is open, for a later worker it is set.",
                hint="a number in every Mesh Workers but the last, or in none",
            )
        stop = blocks if last else start + (worker.blocks or 0)
        if stop > blocks or (last and worker.blocks not in (None, blocks - start)):
            raise PlanError(
                f"The workers run {sum(w.blocks or 0 for w in wanted.workers)} of {blocks - wanted.local} blocks.",
                hint="other numbers in Mesh Workers; 0 shares what is left",
            )
        spans.append((worker.address, f"{start}:{stop}"))
        start = stop
    return spans


def _pairs(placement: Placement) -> Sequence[tuple[Any, Any]]:
    return list(zip(placement.remotes, placement.plan.remote, strict=True))


def _opened(source: WeightSource, placement: Placement, options: SessionOptions, pack: PackState, node: str) -> Session:
    """The session under the first identity that the workers know."""

    def report(activity: Activity) -> None:
        raise_if_interrupted()
        pack.status.show(node, activity)

    pack.status.change(node, NodeState.LOADING, "telling the workers which weights")
    hops = [(remote, hop.span) for remote, hop in _pairs(placement)]
    mismatch: CheckpointMismatch | None = None
    try:
        for identity in source.identities(report):
            try:
                of_file = _of_file(options, identity, source, pack)
                return _open(Session(identity, hops, of_file, pack.plugins, report), pack, node)
            except CheckpointMismatch as error:
                mismatch = mismatch or error
    except BaseException:
        placement.close()
        raise
    placement.close()
    if mismatch is not None and any(p.in_a_format for p in source.checkpoint.spec.parameters.values()):
        # The loader may have made them: what it rounds to fp8 is in no file.
        hint = "the loader's weight_dtype 'default', and the same quantised file on all machines"
        raise CheckpointMismatch(mismatch.message, hint=hint) from mismatch
    raise mismatch or CheckpointMismatch(
        "The weights that ComfyUI holds are not those of a file, so no worker can have them.",
        hint="the loader's weight_dtype 'default', and merges or LoRAs behind Mesh Split",
    )


def _of_file(options: SessionOptions, identity: ModelIdentity, source: WeightSource, pack: PackState) -> SessionOptions:
    """A file may hold quantised what is in memory as plain numbers."""
    if identity.spec.dtypes == source.checkpoint.spec.dtypes:
        return options
    dtype, formats = options.numerics.dtype, pack.weight_formats()
    return replace(options, numerics=usual_numerics(identity.spec, dtype, options.device, formats))


def _open(session: Session, pack: PackState, node: str) -> Session:
    try:
        session.open()
    except PlanDoesNotFit:
        if not pack.close_others(node):
            raise
        session.open()
    return session
