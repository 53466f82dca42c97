"""What a host and a worker agree on when a session opens, checked against the model that is here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mesh_codec.base import CodecChoice, DecodeLimits
from mesh_codec.dtypes import from_name
from mesh_codec.errors import CodecUnsupported
from mesh_core import wire
from mesh_core.crossing.streams import Streams
from mesh_core.errors import CheckpointUnrecognised, PlanError, WireMalformed
from mesh_core.model.library import Checkpoint
from mesh_core.model.numerics import LORA, LORA_ARITHMETICS, Numerics, labels_of, with_loras
from mesh_core.model.spans import BlockSpan
from mesh_core.model.stored import WeightFormat, check_arithmetic, format_of
from mesh_core.plugins.registry import Plugins


def not_near() -> CodecUnsupported:
    """Why a codec is refused that is for processes of one user on one machine."""
    return CodecUnsupported(
        "A state would cross in the memory of this machine, but the other end has not proven to be here.",
        hint="--codec raw",
    )


def span_of(checkpoint: Checkpoint, bounds: Sequence[int], *, may_be_empty: bool = False) -> BlockSpan:
    """The span of the model's blocks with these bounds.

    Raises:
        PlanError: it is empty, backwards, or not within the model.
    """
    span, blocks = BlockSpan(*bounds), checkpoint.spec.blocks
    if span.stop > blocks or not (len(span) or may_be_empty):
        raise PlanError(
            f"Span {span} is not in {checkpoint.name}, which has {blocks} blocks.", hint=f"a span within :{blocks}"
        )
    return span


def numerics_of(
    message: wire.Open,
    checkpoint: Checkpoint,
    span: BlockSpan,
    formats: Mapping[str, WeightFormat],
    device: torch.device,
) -> Numerics:
    """In what a host asks a stage to compute.

    Raises:
        PlanError: a type that holds whole numbers.
        CodecUnsupported: a type that does not exist.
        WireMalformed: a parameter that the stage does not have, or stored weights without a word of how.
        CheckpointUnrecognised: a way of computing that this machine does not have.
    """
    parameters, dtype = checkpoint.spec.parameters_of(span), _dtype_of(message.dtype)
    for name in message.others:
        if name not in parameters:
            raise WireMalformed(f"{name[:80]!r} is no parameter of blocks {span} of {checkpoint.name}.")
    others = tuple(sorted((name, _dtype_of(other)) for name, other in message.others.items()))
    agreed: dict[str, str] = {}
    for label in labels_of(parameters.values()):
        found, kind = format_of(label, formats)
        agreed[label] = _said(message, label)
        check_arithmetic(found, kind, agreed[label], dtype, device)
    computed = None if message.computed is None else tuple(sorted(message.computed.items()))
    if not agreed:
        return Numerics(dtype, others, (), computed)
    loras = _said(message, LORA)
    if loras not in LORA_ARITHMETICS:
        raise CheckpointUnrecognised(
            f"The host computes LoRAs on quantised weights as {loras[:80]!r}; possible: {', '.join(LORA_ARITHMETICS)}.",
            hint="the same version of comfyui-mesh on all machines",
        )
    return Numerics(dtype, others, with_loras(agreed, loras), computed)


def _said(message: wire.Open, label: str) -> str:
    if label not in message.arithmetic:
        raise WireMalformed(f"Nothing was said of how to compute with {label} weights.")
    return message.arithmetic[label]


def _dtype_of(name: str) -> torch.dtype:
    """The type that a stage computes in.

    Raises:
        PlanError: it holds whole numbers.
        CodecUnsupported: nothing has that name.
    """
    dtype = from_name(name)
    if not dtype.lossy:
        raise PlanError(f"No model computes in {dtype.name}.", hint="float32, float16 or bfloat16")
    return dtype.torch


def streams_of(choices: Mapping[str, Any], plugins: Plugins, limits: DecodeLimits) -> Streams:
    """The streams of one direction, from ``tensor -> {"codec": name, "settings": {...}}``.

    Raises:
        WireMalformed: a choice has another form, or names a codec that is not installed here.
    """
    try:
        chosen = {name: CodecChoice(c["codec"], c["settings"]) for name, c in choices.items()}
    except (KeyError, TypeError) as error:
        raise WireMalformed("A codec choice is a map with 'codec' and 'settings'.") from error
    return Streams(chosen, plugins.codecs(), limits)


def check_crossing(checkpoint: Checkpoint, cut: int, streams: Streams) -> None:
    """Whether ``streams`` are for exactly the tensors that exist at ``cut``.

    Raises:
        WireMalformed: they are for others.
    """
    if streams.names != checkpoint.spec.states[cut].keys():
        wanted = ", ".join(sorted(checkpoint.spec.states[cut]))
        raise WireMalformed(f"At block {cut} of {checkpoint.name}, {wanted} cross; other tensors were agreed on.")
