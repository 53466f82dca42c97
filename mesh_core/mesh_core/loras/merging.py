"""One patch on weights in memory, in float32, and which parameters patches make one group of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mesh_core.errors import LoraError
from mesh_core.loras.algorithms import ALGORITHMS
from mesh_core.loras.bounds import MOST_ROWS
from mesh_core.loras.lora import Applied
from mesh_core.loras.patch import Patch

Entry = tuple[Applied, Patch]
"""A patch, and the LoRA with its strengths that it is of."""


def groups_of(patches: Sequence[Patch], held: frozenset[str]) -> dict[str, frozenset[str]]:
    """For each patched parameter, those that must be merged together with it: patches of fused weights join some.

    Raises:
        LoraError: a patch joins parameters of which some are not among ``held``, or patches join more than would fit
            into memory.
    """
    groups: dict[str, frozenset[str]] = {}
    for patch in patches:
        if missing := patch.parameters - held:
            raise LoraError(f"A patch joins {min(patch.parameters & held)} with {min(missing)}, which is not here.")
        joined = frozenset(n for name in patch.parameters for n in groups.get(name, {name}))
        if len(joined) > MOST_ROWS:
            raise LoraError(f"Patches join {len(joined)} weights with {min(joined)}; at most {MOST_ROWS} are accepted.")
        for name in joined:
            groups[name] = joined
    return groups


def merge(patch: Patch, tensors: Mapping[str, Tensor], applied: Applied, weights: dict[str, Tensor]) -> None:
    """Put new tensors in place of those in ``weights`` (float32) that ``patch`` changes; the old ones stay as they are.

    Args:
        tensors: those of the patch by role, in their own type, on any device.
    """
    rows = patch.target
    parts = [weights[r.parameter][r.start : r.stop] for r in rows]
    before = torch.cat(parts) if len(parts) > 1 else parts[0]
    part = before.narrow(*patch.narrow) if patch.narrow is not None else before
    if applied.strength_model != 1.0:
        part = part * applied.strength_model
    here = {role: t.to(part.device, torch.float32) for role, t in tensors.items()}
    after = ALGORITHMS[patch.algorithm].apply(part, here, patch.alpha, applied.strength)
    if patch.narrow is not None:
        changed, dim = before.clone(), patch.narrow
        changed.narrow(*dim).copy_(after)
        after = changed
    position = 0
    for r in rows:
        new, whole = after[position : position + len(r)], weights[r.parameter]
        position += len(r)
        if len(r) != len(whole):
            # Never into ``whole``: it may be the untouched parameter itself.
            new = torch.cat([whole[: r.start], new, whole[r.stop :]])
        weights[r.parameter] = new
