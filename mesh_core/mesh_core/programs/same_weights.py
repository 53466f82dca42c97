"""Whether a model in memory is what a file holds, parameter by parameter and bit by bit.

Workers compute with what is in a file, this machine with what is in memory. So what must be equal is every parameter
that workers are to compute with; the others may differ, they are computed from memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from mesh_codec.memory import uint8_view
from mesh_core.errors import CheckpointChanged
from mesh_core.host.runner import SplitRunner
from mesh_core.model import fingerprint
from mesh_core.model.checkpoint import read_header
from mesh_core.model.claims import with_stored_weights
from mesh_core.model.library import Checkpoint
from mesh_core.model.spec import ParameterSpec
from mesh_core.model.stored_weight import StoredWeight
from mesh_core.model.weights import WeightReader


def first_difference(checkpoint: Checkpoint, held: Mapping[str, Tensor], names: Collection[str]) -> str | None:
    """The first of the parameters ``names`` whose value in ``held`` is not the file's, in the type that it has there.

    Parameters without data are taken for the file's. Reads the others one by one, and no more of the file than them.

    Raises:
        CheckpointError: the file cannot be read, or is not the one that it was.
    """
    reader, parameters = WeightReader(checkpoint.header), checkpoint.spec.parameters
    for name in sorted(names, key=lambda n: checkpoint.header.place(parameters[n].pieces[0].tensor)):
        here = held[name]
        if not here.is_meta and not _same(reader, parameters[name], here.detach()):
            return name
    return None


def fits(checkpoint: Checkpoint, other: Checkpoint) -> bool:
    """Whether both are of one family and have the same parameters, in whatever types."""
    shapes = [{n: p.shape for n, p in c.spec.parameters.items()} for c in (checkpoint, other)]
    return checkpoint.spec.family == other.spec.family and shapes[0] == shapes[1]


def as_it_is_now(checkpoint: Checkpoint, known: str | None) -> Checkpoint:
    """The checkpoint for reading on: itself while its files are what they were, else read anew.

    Args:
        known: its fingerprint; None where all of it is in memory.

    Raises:
        CheckpointChanged: the files hold other weights now.
        CheckpointError: they cannot be read.
    """
    header = read_header(checkpoint.header.path, variant=checkpoint.header.variant)
    if header.stamps == checkpoint.header.stamps:
        return checkpoint
    formats = {t.stored.format for t in checkpoint.header.tensors.values() if t.stored is not None}
    header = with_stored_weights(header, formats)
    spec = checkpoint.adapter.recognise(header)
    same = spec is not None and fingerprint.structure(spec) == fingerprint.structure(checkpoint.spec)
    if spec is None or not same or (known is not None and fingerprint.of_checkpoint(header, spec) != known):
        raise CheckpointChanged(
            f"{header.path} holds other weights than when this pipeline was loaded.",
            hint="load_pipeline() again, or the earlier file back in its place",
        )
    return Checkpoint(header, spec, checkpoint.adapter)


def checkpoint_of(runner: SplitRunner) -> Checkpoint:
    """What a split model reads its blocks from, as it is on disk now; see `as_it_is_now`."""
    if not runner.checkpoint.header.stamps:
        return runner.checkpoint
    known = runner.session.identity.fingerprint if runner.session is not None else None
    return as_it_is_now(runner.checkpoint, known)


def _same(reader: WeightReader, spec: ParameterSpec, here: Tensor) -> bool:
    """Stored weights are the same where their parts are."""
    if not spec.in_a_format:
        return not isinstance(here, StoredWeight) and _same_bits(reader.read(spec).to(here.dtype), here)
    there = reader.read_stored(spec, here.dtype)
    if not isinstance(here, StoredWeight):
        return _same_bits(there.dense(), here)
    same_parts = here.label == there.label and here.parts.keys() == there.parts.keys()
    return same_parts and all(_same_bits(part, here.parts[role]) for role, part in there.parts.items())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Unlike `torch.equal`, which says that no NaN is one, and that the two zeros are."""
    there, here = (t.to("cpu").contiguous() for t in (one, other))
    return there.shape == here.shape and torch.equal(uint8_view(there), uint8_view(here))
