"""The whole extension surface of the mesh: pluggy hooks, entry point group ``mesh.v1``.

An entry point names a module or an object that carries implementations marked with `hookimpl`. The core's own
behaviour is written as plugins of these hooks. docs/reference/hooks.md is generated from this file.

The types that hooks are called with and return can be imported from here; each is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import click

    from mesh_codec.base import Codec, CodecChoice, Quality
    from mesh_core.crossing.bandwidth import Link
    from mesh_core.crossing.cost import Crossing
    from mesh_core.crossing.stats import StepStats
    from mesh_core.loras.policy import LoraFacts, LoraPlacement
    from mesh_core.model.adapter import ModelAdapter
    from mesh_core.model.plan import Hop, WorkerInfo
    from mesh_core.model.spans import BlockSpan
    from mesh_core.model.spec import ModelSpec, Role
    from mesh_core.model.stored import WeightFormat
    from mesh_core.transport.base import Transport

PROJECT = "mesh"
API_MAJOR = 1
ENTRY_POINT_GROUP = f"{PROJECT}.v{API_MAJOR}"

__all__ = [
    "API_MAJOR",
    "ENTRY_POINT_GROUP",
    "BlockSpan",
    "Codec",
    "CodecChoice",
    "Crossing",
    "Hop",
    "Link",
    "LoraFacts",
    "LoraPlacement",
    "ModelAdapter",
    "ModelSpec",
    "Quality",
    "Role",
    "StepStats",
    "Transport",
    "WeightFormat",
    "WorkerInfo",
    "hookimpl",
    "mesh_add_commands",
    "mesh_choose_codec",
    "mesh_place_lora",
    "mesh_propose_split",
    "mesh_register_adapters",
    "mesh_register_codecs",
    "mesh_register_transports",
    "mesh_register_weight_formats",
    "mesh_step_failed",
    "mesh_step_finished",
    "mesh_step_started",
]

_HOMES = {
    "BlockSpan": "mesh_core.model.spans",
    "Codec": "mesh_codec.base",
    "CodecChoice": "mesh_codec.base",
    "Crossing": "mesh_core.crossing.cost",
    "Hop": "mesh_core.model.plan",
    "Link": "mesh_core.crossing.bandwidth",
    "LoraFacts": "mesh_core.loras.policy",
    "LoraPlacement": "mesh_core.loras.policy",
    "ModelAdapter": "mesh_core.model.adapter",
    "ModelSpec": "mesh_core.model.spec",
    "Quality": "mesh_codec.base",
    "Role": "mesh_core.model.spec",
    "StepStats": "mesh_core.crossing.stats",
    "Transport": "mesh_core.transport.base",
    "WeightFormat": "mesh_core.model.stored",
    "WorkerInfo": "mesh_core.model.plan",
}

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def mesh_register_adapters(register: Callable[[ModelAdapter], None]) -> None:
    """Called once at start-up. Call ``register`` with an instance of each model adapter."""


@hookspec
def mesh_register_codecs(register: Callable[[Codec], None]) -> None:
    """Called once at start-up. Call ``register`` with an instance of each codec."""


@hookspec
def mesh_register_transports(register: Callable[[Transport], None]) -> None:
    """Called once at start-up. Call ``register`` with an instance of each transport, by its address scheme."""


@hookspec
def mesh_register_weight_formats(register: Callable[[WeightFormat], None]) -> None:
    """Called once at start-up. Call ``register`` with an instance of each way to store weights."""


@hookspec
def mesh_add_commands(cli: click.Group) -> None:
    """Called when a command is asked for that is not the core's, and to list them. Add commands to ``cli``."""


@hookspec(firstresult=True)
def mesh_propose_split(
    model: ModelSpec, workers: Sequence[WorkerInfo], links: Sequence[Link | None]
) -> Sequence[Hop] | None:
    """Called when the user leaves the cut open. Return one hop per span in execution order, or None to pass.

    ``workers[0]`` is the host itself. ``links[i]`` is the way from the host to ``workers[i]``, measured just now, and
    None for the host. The spans must cover the model without gaps.
    """


@hookspec(firstresult=True)
def mesh_choose_codec(
    role: Role,
    link: Link | None,
    quality: Quality,
    codecs: Sequence[Codec],
    peer: dict[str, Any],
    crossing: Crossing,
) -> CodecChoice | None:
    """Called for each role of tensors that cross a cut: when a session opens, before each of its first steps, and
    from then on before a step if half a second has passed or the state has another size. Return a choice, or None to
    pass.

    ``link`` is the way that they take, None if nobody could measure it. ``codecs`` are those that all ends have;
    ``peer`` maps a codec's name to the other end's capabilities. ``crossing`` knows the size of the tensors, what is
    in use now, and what each codec would cost: ``crossing.cost(codec, settings)``. Where the answer is another codec
    or other settings than before, both ends start new streams before the step.
    """


@hookspec(firstresult=True)
def mesh_place_lora(lora: LoraFacts, stage: BlockSpan, worker: WorkerInfo) -> LoraPlacement | None:
    """Called on the host for each LoRA and each remote span. Return a `LoraPlacement`, or None to pass.

    ``lora`` says how large it is, whether the worker has it and what the user's settings are.
    """


@hookspec
def mesh_step_started(step: int) -> None:
    """Called on the host before a step crosses the first cut."""


@hookspec
def mesh_step_finished(step: int, stats: StepStats) -> None:
    """Called on the host after a step came back."""


@hookspec
def mesh_step_failed(step: int, error: BaseException) -> None:
    """Called on the host when a step is given up; ``error`` is raised to the caller afterwards."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
