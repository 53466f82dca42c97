"""oft and boft: rows of the weight are rotated, block by block. The rotations are lycoris-lora's."""

from __future__ import annotations

from torch import Tensor

from mesh_core.loras.algorithms.adding import add
from mesh_core.loras.algorithms.algorithm import DECOMPOSED, Algorithm, Shapes, Tensors


def _oft_fits(shape: tuple[int, ...], s: Shapes) -> bool:
    blocks = s["blocks"]
    return len(blocks) == 3 and blocks[1] == blocks[2] and blocks[0] * blocks[1] == shape[0]


def _oft(weight: Tensor, t: Tensors, alpha: float | None, strength: float) -> Tensor:
    from lycoris.functional import diag_oft

    # ComfyUI uses the strength twice and no ``rescale``; files are tuned to what they look like there.
    delta = diag_oft.diff_weight(weight, t["blocks"], None, constraint=alpha, backend="torch")
    return add(weight, strength * delta, t, alpha or 0.0, strength, plain=1.0)


def _boft_fits(shape: tuple[int, ...], s: Shapes) -> bool:
    blocks = s["blocks"]
    if len(blocks) != 4 or blocks[2] != blocks[3] or blocks[2] % 2 or blocks[1] * blocks[2] != shape[0]:
        return False
    # Stage i mixes rows that are 2^i half blocks apart; the groups must fill the weight.
    return all(shape[0] % (2 ** (i + 1) * (blocks[2] // 2)) == 0 for i in range(min(blocks[0], 64)))


def _boft(weight: Tensor, t: Tensors, alpha: float | None, strength: float) -> Tensor:
    from lycoris.functional import boft

    delta = boft.diff_weight(weight, t["blocks"], t.get("rescale"), constraint=alpha, scale=strength, backend="torch")
    return add(weight, delta, t, alpha or 0.0, strength, plain=1.0)


OFT = Algorithm(("blocks",), ("rescale", *DECOMPOSED), _oft_fits, _oft, 4, most_of_tensors=6)
"""One rotation of each block of rows."""

BOFT = Algorithm(("blocks",), ("rescale", *DECOMPOSED), _boft_fits, _boft, 4, most_of_tensors=6)
"""Several rotations, each of rows further apart than the last: a butterfly."""
