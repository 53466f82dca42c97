"""lora, loha and lokr: the change is a product of small tensors. The products are lycoris-lora's but for plain lora."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from mesh_core.loras.algorithms.adding import add
from mesh_core.loras.algorithms.algorithm import DECOMPOSED, Algorithm, Shapes, Tensors


def _lora_fits(shape: tuple[int, ...], s: Shapes) -> bool:
    up, down, mid = s["up"], s["down"], s.get("mid")
    kernel = mid[2:] if mid else down[2:]
    fits = len(up) >= 2 and len(down) >= 2 and up[1] == (mid[0] if mid else down[0]) and (not mid or mid[1] == down[0])
    return fits and (up[0], down[1]) == shape[:2] and prod(kernel) == prod(shape[2:])


def _lora(weight: Tensor, t: Tensors, alpha: float | None, strength: float) -> Tensor:
    scale = alpha / t["down"].shape[0] if alpha is not None else 1.0
    if "mid" in t:
        from lycoris.functional import locon

        delta = locon.diff_weight(t["down"], t["up"], t["mid"], gamma=1.0, backend="torch")
    else:
        delta = torch.mm(t["up"].flatten(1), t["down"].flatten(1))
    return add(weight, delta.reshape(weight.shape), t, scale, strength)


def _loha_fits(shape: tuple[int, ...], s: Shapes) -> bool:
    if ("t1" in s) != ("t2" in s):
        return False
    if "t1" in s:
        return all(s[f"w{i}_a"][1] == shape[0] and s[f"w{i}_b"][1] == shape[1] for i in (1, 2)) and all(
            s[f"t{i}"][:2] == (s[f"w{i}_a"][0], s[f"w{i}_b"][0]) and prod(s[f"t{i}"][2:]) == prod(shape[2:])
            for i in (1, 2)
        )
    return all(
        s[f"w{i}_a"][0] == shape[0] and s[f"w{i}_a"][1] == s[f"w{i}_b"][0] and prod(s[f"w{i}_b"][1:]) == prod(shape[1:])
        for i in (1, 2)
    )


def _loha(weight: Tensor, t: Tensors, alpha: float | None, strength: float) -> Tensor:
    from lycoris.functional import loha

    scale = alpha / t["w1_b"].shape[0] if alpha is not None else 1.0
    delta = loha.diff_weight(
        t["w1_b"],
        t["w1_a"],
        t["w2_b"],
        t["w2_a"],
        t.get("t1"),
        t.get("t2"),
        gamma=torch.ones((), device=weight.device),
        backend="torch",
    )
    return add(weight, delta.reshape(weight.shape), t, scale, strength)


def _lokr_half(s: Shapes, name: str) -> tuple[int, ...] | None:
    if name in s:
        return s[name]
    a, b, core = s[f"{name}_a"], s[f"{name}_b"], s.get(name.replace("w", "t"))
    if core is not None:
        return (a[1], b[1], *core[2:]) if core[:2] == (a[0], b[0]) else None
    return (a[0], *b[1:]) if a[1] == b[0] else None


def _lokr_fits(shape: tuple[int, ...], s: Shapes) -> bool:
    if not all(name in s or (f"{name}_a" in s and f"{name}_b" in s) for name in ("w1", "w2")):
        return False
    first, second = _lokr_half(s, "w1"), _lokr_half(s, "w2")
    if first is None or second is None or len(first) < 2 or len(second) < 2:
        return False
    return (first[0] * second[0], first[1] * second[1]) == shape[:2] and prod(second[2:]) == prod(shape[2:])


def _lokr(weight: Tensor, t: Tensors, alpha: float | None, strength: float) -> Tensor:
    from lycoris.functional import lokr

    rank = t["w2_b"].shape[0] if "w2" not in t else t["w1_b"].shape[0] if "w1" not in t else None
    scale = alpha / rank if alpha is not None and rank is not None else 1.0
    names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    delta = lokr.kron_weight(*(t.get(name) for name in names), scale=1.0, backend="torch")
    return add(weight, delta.reshape(weight.shape), t, scale, strength)


LORA = Algorithm(("up", "down"), ("mid", *DECOMPOSED, "magnitude"), _lora_fits, _lora, 3, "down")
"""``up @ down``, with ``mid`` between them for convolutions."""

LOHA = Algorithm(("w1_a", "w1_b", "w2_a", "w2_b"), ("t1", "t2", *DECOMPOSED), _loha_fits, _loha, 4, "w1_b")
"""Two such products, multiplied element by element."""

LOKR = Algorithm((), ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2", *DECOMPOSED), _lokr_fits, _lokr, 3)
"""The Kronecker product of two tensors, each whole or a product."""
