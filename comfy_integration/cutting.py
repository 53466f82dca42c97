"""Cuts a model: from a patcher and what the user chose in the node to a patcher whose remote blocks run on workers."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import torch

from mesh_codec.base import Quality
from mesh_codec.errors import CodecError
from mesh_core.errors import CheckpointMismatch, MeshError, PlanDoesNotFit, PlanError
from mesh_core.host.options import SessionOptions
from mesh_core.host.progress import Activity
from mesh_core.host.runner import Placement, Workers, place
from mesh_core.host.session import Session
from mesh_core.model.spans import BlockSpan
from mesh_core.system.config import Settings

from .guard import require
from .hub import Hub
from .identity import recognised
from .shadow import ROOT, shadow
from .shadow import nbytes as held_bytes
from .source import FILE, LoadedModel, Source, names_of
from .split import KEY, OnFailure, Split, attach, interrupted
from .status import State
from .workers import WorkerRef

log = logging.getLogger(__name__)

LORA_POLICIES: Mapping[str, str] = {"automatic": "default", "always send": "always-send", "never send": "never-send"}
"""What the node calls the core's policies for LoRAs that a worker does not have. None of them leaves one out."""


@dataclass(frozen=True)
class Choice:
    """What the user set in the node. ``local``: number of blocks that run here; None to have it proposed."""

    workers: Sequence[WorkerRef]
    local: int | None
    quality: Quality
    loras: str
    on_failure: OnFailure

    def settings(self) -> Settings:
        settings = Settings.load()
        waits = settings.deadlines.reconnect if self.on_failure == "wait for it" else 0.0
        return replace(
            settings,
            loras=replace(settings.loras, policy=LORA_POLICIES[self.loras]),
            deadlines=replace(settings.deadlines, reconnect=waits),
        )


def cut(patcher: Any, choice: Choice, hub: Hub, node: str) -> Any:
    """The model of ``patcher``, split; the node shows what became of it.

    Raises:
        MeshError, CodecError: with what to do; ``patcher`` is as it was.
    """
    try:
        return _cut(patcher, choice, hub, node)
    except (MeshError, CodecError) as error:
        hub.status.fail(node, error)
        raise


def _cut(patcher: Any, choice: Choice, hub: Hub, node: str) -> Any:
    if patcher.get_attachment(KEY) is not None:
        raise PlanError(
            "This model is split already.", hint="one Mesh Split per model; Mesh Workers for several workers"
        )
    source = _source(patcher, hub)
    require(source.side)
    spec = source.checkpoint.spec
    if choice.local is not None and choice.local > spec.blocks:
        raise PlanError(
            f"This model ({spec.family} {spec.variant}) has {spec.blocks} blocks; {choice.local} cannot run here.",
            hint=f"local_blocks from 0 to {spec.blocks}, or -1 to have it proposed",
        )
    if choice.local == spec.blocks:
        hub.close(node)
        hub.status.start(node, (), spec.blocks, spec.blocks)
        hub.status.change(node, State.LOCAL, "All blocks run here.")
        if isinstance(source, LoadedModel):
            return patcher
        return attach(patcher, _shadow(patcher, source, spec.blocks, hub, node), None)
    settings, device = choice.settings(), torch.device(patcher.load_device)
    options = SessionOptions(_compute_type(patcher), device, choice.quality, settings, watch=interrupted)
    placement = _place(source, choice, hub, options, device)
    if not placement.remotes:
        placement.close()
        return _cut(patcher, replace(choice, local=spec.blocks), hub, node)
    local = placement.plan.local.stop
    reached = [{"name": r.welcome.name, "address": r.address.text, "span": str(h.span)} for r, h in _pairs(placement)]
    hub.status.start(node, reached, spec.blocks, local)
    session = _opened(source, placement, options, hub, node)
    hub.keep(node, session)
    model = _shadow(patcher, source, local, hub, node)
    remote = names_of(source.checkpoint, BlockSpan(0, spec.blocks)) - names_of(source.checkpoint, BlockSpan(0, local))
    prefix = getattr(source, "prefix", "")
    names = frozenset(ROOT + name.removeprefix(prefix) for name in remote)
    hub.status.change(node, State.CONNECTED)
    split = Split(hub, node, source, local, session, choice.on_failure, names, weakref.ref(model))
    return attach(patcher, model, split)


def _source(patcher: Any, hub: Hub) -> Source:
    file: Source | None = patcher.get_attachment(FILE)
    if file is not None:
        return file
    checkpoint, side = recognised(patcher.model, hub.plugins)
    return LoadedModel(patcher, checkpoint, side)


def _shadow(patcher: Any, source: Source, local: int, hub: Hub, node: str) -> Any:
    model = shadow(patcher.model, source.weights(BlockSpan(0, local)))
    hub.status.holds(node, held_bytes(model.diffusion_model), getattr(source, "bytes_read", 0))
    return model


def _compute_type(patcher: Any) -> torch.dtype:
    cast: torch.dtype | None = patcher.get_model_object("manual_cast_dtype")
    dtype: torch.dtype = cast if cast is not None else patcher.model.get_dtype()
    return dtype


def _place(source: Source, choice: Choice, hub: Hub, options: SessionOptions, device: torch.device) -> Placement:
    spec = source.checkpoint.spec
    local = None if choice.local is None else f":{choice.local}"
    free = comfy.model_management.get_total_memory(device)
    return place(source.checkpoint, local, _spans(spec.blocks, choice), hub.plugins, options, free)


def _spans(blocks: int, choice: Choice) -> Workers:
    """Workers with the spans that follow from how many blocks each was given; the last one runs to the end."""
    if choice.local is None or all(worker.blocks is None for worker in choice.workers):
        return [worker.address for worker in choice.workers]
    spans: list[tuple[str, str]] = []
    start = choice.local
    for index, worker in enumerate(choice.workers):
        last = index == len(choice.workers) - 1
        if not last and worker.blocks is None:
            raise PlanError(
                f"How many blocks {worker.address} runs is open, for a later worker it is set.",
                hint="a number in every Mesh Workers but the last, or in none",
            )
        stop = blocks if last else start + (worker.blocks or 0)
        if stop > blocks or (last and worker.blocks not in (None, blocks - start)):
            raise PlanError(
                f"The workers run {sum(w.blocks or 0 for w in choice.workers)} of {blocks - choice.local} blocks.",
                hint="other numbers in Mesh Workers; 0 shares what is left",
            )
        spans.append((worker.address, f"{start}:{stop}"))
        start = stop
    return spans


def _pairs(placement: Placement) -> Sequence[tuple[Any, Any]]:
    return list(zip(placement.remotes, placement.plan.remote, strict=True))


def _opened(source: Source, placement: Placement, options: SessionOptions, hub: Hub, node: str) -> Session:
    """The session under the first identity that the workers know."""

    def report(activity: Activity) -> None:
        interrupted()
        hub.status.show(node, activity)

    hub.status.change(node, State.LOADING, "telling the workers which weights")
    hops = [(remote, hop.span) for remote, hop in _pairs(placement)]
    mismatch: CheckpointMismatch | None = None
    try:
        for identity in source.identities(report):
            try:
                return _open(Session(identity, hops, options, hub.plugins, report), hub, node)
            except CheckpointMismatch as error:
                mismatch = mismatch or error
    except BaseException:
        placement.close()
        raise
    placement.close()
    raise mismatch or CheckpointMismatch(
        "The weights that ComfyUI holds are not those of a file, so no worker can have them.",
        hint="the loader's weight_dtype 'default', and merges or LoRAs behind Mesh Split",
    )


def _open(session: Session, hub: Hub, node: str) -> Session:
    try:
        session.open()
    except PlanDoesNotFit:
        if not hub.close_others(node):
            raise
        session.open()
    return session
