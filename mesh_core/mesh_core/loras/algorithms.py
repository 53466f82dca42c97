"""What each LoRA algorithm does to a weight, in float32. Knows no files, names or models.

Where a program defines what a file means, its order of operations is kept, so results agree to the last bit or two:
ComfyUI's for everything but ``magnitude``, which is PEFT's. The products of loha, lokr, oft and boft are
lycoris-lora's. ``shape`` is that of the weight, [out, in, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Algorithm:
    """One kind of patch.

    Attributes:
        required, optional: roles of its tensors.
        fits: whether tensors of these shapes give a change of a weight of this shape.
        apply: (weight, tensors, alpha, strength) -> a new weight; changes none of them.
        rank_role: the tensor whose first dimension is the rank that ``alpha`` is divided by, if that is all to it.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    fits: Callable[[tuple[int, ...], Shapes], bool]
    apply: Callable[[Tensor, Tensors, float | None, float], Tensor]
    rank_role: str = ""

    def problem(self, shape: tuple[int, ...], shapes: Shapes) -> str:
        """Why tensors of ``shapes`` cannot patch a weight of ``shape``; empty if they can."""
        missing = [role for role in self.required if role not in shapes]
        unknown = sorted(shapes.keys() - {*self.required, *self.optional})
        if missing or unknown:
            return f"it lacks {missing[0]}" if missing else f"it has no use for {unknown[0][:64]}"
        try:
            fits = self.fits(shape, shapes)
        except IndexError:
            fits = False
        if not fits:
            return "rank or shape differ"
        for role in ("dora_scale", "magnitude"):
            if role in shapes and prod(shapes[role]) not in (shape[0], prod(shape[1:2])):
                return f"{role} has another size"
        return ""


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
    return _add(weight, delta.reshape(weight.shape), t, scale, strength)


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
    return _add(weight, delta.reshape(weight.shape), t, scale, strength)


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
    return _add(weight, delta.reshape(weight.shape), t, scale, strength)


def _glora_rank(shape: tuple[int, ...], s: Shapes) -> tuple[int, bool] | None:
    """The rank, and whether the tensors are laid out as early versions of LyCORIS did; None if neither fits."""
    a1, a2, b1, b2 = ((s[n][0], prod(s[n][1:])) for n in ("a1", "a2", "b1", "b2"))
    old = b2[1] == b1[0] == a1[0] == a2[1]
    new = b2[0] == b1[1] == a1[1] == a2[0]
    if new and not (old and a2[0] == shape[0] == shape[1]):
        return a2[0], False
    return (a1[0], True) if old else None


def _glora_fits(shape: tuple[int, ...], s: Shapes) -> bool:
    found = _glora_rank(shape, s)
    if found is None:
        return False
    columns = prod(shape[1:])
    a1, a2, b1, b2 = ((s[n][0], prod(s[n][1:])) for n in ("a1", "a2", "b1", "b2"))
    if found[1]:
        return (a2[0], a1[1], b2[0], b1[1]) == (columns, columns, shape[0], columns)
    return (a1[0], a2[1], b1[0], b2[1]) == (shape[1], shape[1], shape[0], columns)


def _glora(weight: Tensor, t: Tensors, alpha: float | None, strength: float) -> Tensor:
    found = _glora_rank(tuple(weight.shape), {role: tuple(x.shape) for role, x in t.items()})
    assert found is not None
    rank, old = found
    a1, a2, b1, b2 = (t[n].flatten(1) for n in ("a1", "a2", "b1", "b2"))
    if old:
        delta = (b2 @ b1 + weight.flatten(1) @ a2 @ a1).reshape(weight.shape)
    else:
        inner = torch.einsum("o i ..., i j -> o j ...", torch.einsum("o i ..., i j -> o j ...", weight, a1), a2)
        delta = (weight @ a1 @ a2 if weight.dim() == 2 else inner) + (b1 @ b2).reshape(weight.shape)
    return _add(weight, delta, t, alpha / rank if alpha is not None else 1.0, strength)


def _oft_fits(shape: tuple[int, ...], s: Shapes) -> bool:
    blocks = s["blocks"]
    return len(blocks) == 3 and blocks[1] == blocks[2] and blocks[0] * blocks[1] == shape[0]


def _oft(weight: Tensor, t: Tensors, alpha: float | None, strength: float) -> Tensor:
    from lycoris.functional import diag_oft

    # ComfyUI uses the strength twice and no ``rescale``; files are tuned to what they look like there.
    delta = diag_oft.diff_weight(weight, t["blocks"], None, constraint=alpha, backend="torch")
    return _add(weight, strength * delta, t, alpha or 0.0, strength, plain=1.0)


def _boft_fits(shape: tuple[int, ...], s: Shapes) -> bool:
    blocks = s["blocks"]
    if len(blocks) != 4 or blocks[2] != blocks[3] or blocks[2] % 2 or blocks[1] * blocks[2] != shape[0]:
        return False
    # Stage i mixes rows that are 2^i half blocks apart; the groups must fill the weight.
    return all(shape[0] % (2 ** (i + 1) * (blocks[2] // 2)) == 0 for i in range(min(blocks[0], 64)))


def _boft(weight: Tensor, t: Tensors, alpha: float | None, strength: float) -> Tensor:
    from lycoris.functional import boft

    delta = boft.diff_weight(weight, t["blocks"], t.get("rescale"), constraint=alpha, scale=strength, backend="torch")
    return _add(weight, delta, t, alpha or 0.0, strength, plain=1.0)


def _diff(weight: Tensor, t: Tensors, alpha: float | None, strength: float) -> Tensor:
    return weight + strength * t["diff"].reshape(weight.shape)


def _set(weight: Tensor, t: Tensors, alpha: float | None, strength: float) -> Tensor:
    # As in ComfyUI, a value that is set has no strength.
    return t["value"].reshape(weight.shape).clone()


def _add(
    weight: Tensor, delta: Tensor, t: Tensors, scale: float, strength: float, *, plain: float | None = None
) -> Tensor:
    """``weight + strength * scale * delta``, or its weight-decomposed form; ``plain``: the scale without DoRA. Uses up
    ``delta``."""
    if "dora_scale" in t:
        return _comfy_dora(weight, delta * scale, t["dora_scale"], strength)
    if "magnitude" in t:
        merged = weight + delta * (scale * strength)
        norm = merged.flatten(1).norm(dim=1)
        factor: Tensor = (t["magnitude"].reshape(-1) / norm).reshape(-1, *[1] * (weight.dim() - 1))
        return factor * merged
    amount = strength * (scale if plain is None else plain)
    return weight + (delta if amount == 1.0 else delta.mul_(amount))


def _comfy_dora(weight: Tensor, delta: Tensor, dora_scale: Tensor, strength: float) -> Tensor:
    changed = weight + delta
    ones = [1] * (weight.dim() - 1)
    if dora_scale.shape[0] == changed.shape[0]:
        norm = weight.reshape(weight.shape[0], -1).norm(dim=1, keepdim=True).reshape(weight.shape[0], *ones)
    else:
        columns = changed.transpose(0, 1)
        norm = columns.reshape(columns.shape[0], -1).norm(dim=1, keepdim=True).reshape(columns.shape[0], *ones)
        norm = norm.transpose(0, 1)
    changed *= dora_scale / (norm + torch.finfo(weight.dtype).eps)
    if strength == 1.0:
        return changed
    return weight + strength * (changed - weight)


def _same(role: str) -> Callable[[tuple[int, ...], Shapes], bool]:
    return lambda shape, s: s[role] == shape or (prod(s[role]), s[role][:1]) == (prod(shape), shape[:1])


_DORA = ("dora_scale",)

ALGORITHMS: Mapping[str, Algorithm] = {
    "lora": Algorithm(("up", "down"), ("mid", "dora_scale", "magnitude"), _lora_fits, _lora, "down"),
    "loha": Algorithm(("w1_a", "w1_b", "w2_a", "w2_b"), ("t1", "t2", *_DORA), _loha_fits, _loha, "w1_b"),
    "lokr": Algorithm((), ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2", *_DORA), _lokr_fits, _lokr),
    "glora": Algorithm(("a1", "a2", "b1", "b2"), _DORA, _glora_fits, _glora),
    "oft": Algorithm(("blocks",), ("rescale", *_DORA), _oft_fits, _oft),
    "boft": Algorithm(("blocks",), ("rescale", *_DORA), _boft_fits, _boft),
    "diff": Algorithm(("diff",), (), _same("diff"), _diff),
    "set": Algorithm(("value",), (), _same("value"), _set),
}
"""Every algorithm by name."""

Roles = dict[str, Any]
