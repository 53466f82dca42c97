"""What people want to know of a checkpoint: its size, its blocks, where to cut it. Plain values; reads headers only."""

from __future__ import annotations

from typing import Any

from mesh_core.model import fingerprint
from mesh_core.model.library import Checkpoint
from mesh_core.model.sizes import RESERVE, file_itemsize, fitting, span_bytes
from mesh_core.model.spans import BlockSpan


def facts(checkpoint: Checkpoint, memory: int | None = None, *, with_fingerprint: bool = False) -> dict[str, Any]:
    """Family, variant, dtypes, bytes of all and of each block, as JSON takes them.

    Args:
        memory: bytes of a GPU, to suggest a cut for.
        with_fingerprint: also hash all weights, which reads the whole file.
    """
    spec = checkpoint.spec
    size = file_itemsize(spec)
    sizes = dict.fromkeys((BlockSpan(i, i + 1) for i in range(spec.blocks)), 0)
    for parameter in spec.parameters.values():
        if parameter.scope in sizes:
            sizes[parameter.scope] += parameter.nbytes(size)
    found: dict[str, Any] = {
        "path": str(checkpoint.header.path),
        "family": spec.family,
        "variant": spec.variant,
        "dtypes": list(spec.dtypes),
        "bytes": sum(p.nbytes(size) for p in spec.parameters.values()),
        "stage_bytes": span_bytes(spec, BlockSpan(0, spec.blocks), size),
        "blocks": [{"kind": k, "bytes": b} for k, b in zip(spec.block_kinds, sizes.values(), strict=True)],
    }
    if with_fingerprint:
        found["fingerprint"] = fingerprint.of_checkpoint(checkpoint.header, spec)
    if memory is not None:
        local = fitting(spec, memory, size)
        found["suggestion"] = {
            "memory": memory,
            "reserve": RESERVE,
            "local": f":{local}",
            "local_bytes": span_bytes(spec, BlockSpan(0, local), size),
            "remote_bytes": span_bytes(spec, BlockSpan(local, spec.blocks), size),
        }
    return found
