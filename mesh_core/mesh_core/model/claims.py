"""Which tensors of a checkpoint are weights in a format, and that nothing is left which nobody understands.

Adapters get a header in which every weight stands under its own name, with the shape of its numbers. What a format did
not claim and no model has (a scale, a marker, a note on quantisation) would change what is computed, so it is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from mesh_core.errors import CheckpointUnrecognised
from mesh_core.model.checkpoint import CheckpointHeader
from mesh_core.model.stored import Claim, StoredTensor, TensorInfo, WeightFormat

_NOTES = ("_quantization_metadata",)
"""Entries of a file's metadata that say how weights are stored."""

_CONFIG_NOTES = ("quantization_config", "compression_config")
"""Entries of ``config.json`` that say so."""

_MARKER_WORDS = ("scaled_fp8", "comfy_quant", "weight_scale", "scale_weight", "input_scale", "scale_input")
"""Last parts of tensors' names that say so, wherever they stand: another one beside a weight is refused as well."""

_HINT = "a bfloat16 copy of the model, or an fp8, nvfp4 or GGUF file in one of the formats of docs/reference/weights.md"


def with_stored_weights(header: CheckpointHeader, formats: Iterable[WeightFormat]) -> CheckpointHeader:
    """``header`` with the weights of all ``formats`` as tensors of their own, without their parts and markers.

    Raises:
        CheckpointCorrupt: a weight's parts do not fit each other.
        CheckpointUnrecognised: two formats claim one tensor, or the file says that it is quantised in a way that
            no format reads.
    """
    claims = {f.name: claim for f in formats if (claim := f.claim(header)) != Claim()}
    owners: dict[str, str] = {}
    for name, claim in claims.items():
        for tensor in _taken(claim):
            if owners.setdefault(tensor, name) != name:
                raise CheckpointUnrecognised(
                    f"{header.path}: {tensor} could be stored as {owners[tensor]} or as {name}, with other numbers.",
                    hint=_HINT,
                )
    for kind, notes, known in (
        ("metadata", [n for n in _NOTES if n in header.metadata], [c.metadata for c in claims.values()]),
        ("config.json", [n for n in _CONFIG_NOTES if n in header.config], [c.config for c in claims.values()]),
    ):
        for note in notes:
            if not any(note in names for names in known):
                raise CheckpointUnrecognised(
                    f"{header.path} is quantised in a way that is not read: its {kind} says so ({note}).", hint=_HINT
                )
    tensors = {name: info for name, info in header.tensors.items() if name not in owners}
    for claim in claims.values():
        tensors |= {name: _as_one(name, stored) for name, stored in claim.tensors.items()}
    for name in tensors:
        if name.rpartition(".")[2] in _MARKER_WORDS:
            raise CheckpointUnrecognised(
                f"{header.path} is quantised in a way that is not read: {name} belongs to no format.", hint=_HINT
            )
    return replace(header, tensors=tensors) if claims else header


def refuse_companions(header: CheckpointHeader, used: Collection[str]) -> None:
    """Refuse tensors that stand beside a weight of the model and are none of its own.

    Args:
        used: the tensors that the model's parameters are made from.

    Raises:
        CheckpointUnrecognised: names the first.
    """
    modules = {name.rpartition(".")[0] for name in used if "." in name}
    for name in sorted(header.tensors.keys() - set(used)):
        if name.rpartition(".")[0] in modules:
            raise CheckpointUnrecognised(
                f"{header.path} holds {name} beside the weights of that layer, and nothing here knows what it means: "
                "the model would be computed without it.",
                hint=_HINT,
            )


def _taken(claim: Claim) -> set[str]:
    """Names in the file that a format takes for itself."""
    parts = {info.name for stored in claim.tensors.values() for info in stored.parts.values()}
    return parts | claim.markers | claim.tensors.keys()


def _as_one(name: str, stored: StoredTensor) -> TensorInfo:
    codes = stored.parts["codes"]
    nbytes = sum(part.nbytes for part in stored.parts.values())
    return TensorInfo(name, stored.label, stored.shape, codes.file, codes.offset, nbytes, stored)
