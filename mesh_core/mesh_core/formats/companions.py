"""What stands beside codes in a file: tensors of the type and shape that they must have, and markers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod

from torch import Tensor

from mesh_core.errors import CheckpointCorrupt
from mesh_core.formats.float8 import checked_scales
from mesh_core.formats.markers import Marked
from mesh_core.model.stored import Claim, Header, StoredTensor, TensorInfo

SCALAR: tuple[tuple[int, ...], ...] = ((), (1,))


def companion(header: Header, name: str, dtypes: Collection[str], shapes: Collection[tuple[int, ...]]) -> TensorInfo:
    """The tensor ``name``.

    Args:
        dtypes: it may have, as safetensors calls them.
        shapes: it may have.

    Raises:
        CheckpointCorrupt: it is not there, or not of those.
    """
    info = header.tensors.get(name)
    if info is None:
        raise CheckpointCorrupt(
            f"{header.path} lacks {name}, which belongs to a quantised layer.", hint="copy the whole file again"
        )
    if info.dtype not in dtypes or info.shape not in shapes:
        raise CheckpointCorrupt(
            f"{header.path}: {name} is {info.dtype} {list(info.shape)}; its layer asks for "
            f"{' or '.join(dtypes)} {' or '.join(str(list(s)) for s in shapes)}."
        )
    # Not a type of numbers that the reader of headers knows the size of.
    if info.dtype == "F8_E8M0" and info.nbytes != prod(info.shape):
        raise CheckpointCorrupt(f"{header.path}: {name} does not have the size that its shape asks for.")
    return info


def matrix(header: Header, name: str, dtype: str, block: int) -> TensorInfo:
    """The codes ``name``: [rows, bytes], and each row whole blocks.

    Raises:
        CheckpointCorrupt: it is not there, or not that.
    """
    info = header.tensors.get(name)
    if info is None or info.dtype != dtype:
        there = f"is {info.dtype}" if info else "is not there"
        raise CheckpointCorrupt(f"{header.path}: {name} {there}; the marker of its layer asks for {dtype}.")
    if len(info.shape) != 2 or 0 in info.shape or info.shape[1] % block:
        raise CheckpointCorrupt(
            f"{header.path}: {name} has the shape {list(info.shape)}, not rows of whole blocks of {block} bytes."
        )
    return info


def claim_layers(
    header: Header, marked: Marked, layers: Mapping[str, StoredTensor], config: Collection[str] = ()
) -> Claim:
    """The claim of layers by name, with their markers and with the scales of inputs, which dequantising does not need.

    Args:
        marked: of all layers of the file.
        config: entries of ``config.json`` that the format agrees with.

    Raises:
        CheckpointCorrupt: the scale of an input is no single number.
    """
    inputs = {f"{layer}.input_scale" for layer in layers} & header.tensors.keys()
    for name in inputs:
        companion(header, name, ("F32",), SCALAR)
    return Claim(
        {f"{layer}.weight": stored for layer, stored in layers.items()},
        frozenset(inputs | {name for layer, name in marked.tensors.items() if layer in layers}),
        marked.metadata if layers else frozenset(),
        frozenset(config),
    )


def row_scales(stored: StoredTensor, scale: Tensor, start: int, stop: int) -> Tensor:
    """The part ``scale`` of a weight, one number or one per row, as one per row of ``start:stop``: F32, contiguous.

    Raises:
        CheckpointCorrupt: one is no positive finite number.
    """
    scale = scale.reshape(-1)
    mine = scale[start:stop] if len(scale) == stored.shape[0] else scale
    return checked_scales(stored, "scale", mine, len(mine)).expand(stop - start).contiguous()
