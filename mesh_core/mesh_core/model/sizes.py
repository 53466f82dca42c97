"""How large spans of blocks are, and cutting models by that.

Bytes are those of the weights in the dtype that stages compute in, of which ``itemsize`` is the bytes per weight.
Stored weights count as they are stored, with what the largest one needs for the moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mesh_core.model.spans import BlockSpan

if TYPE_CHECKING:
    from mesh_core.model.spec import ModelSpec, ParameterSpec

RESERVE = 2 << 30
"""Bytes of a device that a proposed cut leaves to activations, text encoder and autoencoder."""


def span_bytes(model: ModelSpec, span: BlockSpan, itemsize: int = 2) -> int:
    """Bytes that a stage of ``span`` needs for its weights."""
    parameters = model.parameters_of(span)
    return sum(p.nbytes(itemsize) for p in parameters.values()) + transient(parameters)


def transient(parameters: Mapping[str, ParameterSpec]) -> int:
    """Bytes that computing with stored weights needs for the moment, one weight at a time."""
    return max((p.transient for p in parameters.values()), default=0)


def file_itemsize(model: ModelSpec) -> int:
    """Bytes per weight in the checkpoint, the widest type of it: what a stage needs unless it is told to cast."""
    from mesh_codec.dtypes import from_safetensors

    plain = [from_safetensors(dtype).itemsize for dtype in model.dtypes if "/" not in dtype]
    # Beside stored weights, norms and the like are in float32 often; nobody computes in it because of that.
    return max(plain, default=2) if len(plain) == len(model.dtypes) else 2


def divide(model: ModelSpec, span: BlockSpan, weights: Sequence[float]) -> list[BlockSpan]:
    """``span`` cut into ``len(weights)`` spans whose bytes are as near to those proportions as blocks allow."""
    sizes = [span_bytes(model, BlockSpan(i, i + 1)) for i in range(span.start, span.stop)]
    total, shares, start = sum(sizes), [], span.start
    filled, wanted = 0.0, 0.0
    for weight in weights[:-1]:
        wanted += total * weight / (sum(weights) or 1)
        stop = start
        while stop < span.stop and filled + sizes[stop - span.start] / 2 <= wanted:
            filled += sizes[stop - span.start]
            stop += 1
        shares.append(BlockSpan(start, stop))
        start = stop
    return [*shares, BlockSpan(start, span.stop)]


def fitting(model: ModelSpec, memory: int, itemsize: int = 2, reserve: int = RESERVE) -> int:
    """The largest k for which blocks ``:k`` fit into ``memory`` bytes beside ``reserve``; 0 if none does."""
    fits = [k for k in range(model.blocks + 1) if span_bytes(model, BlockSpan(0, k), itemsize) + reserve <= memory]
    return max(fits, default=0)
