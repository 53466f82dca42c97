"""LoRA files of every algorithm for tiny-klein's blocks, in the naming that ComfyUI shares with Black Forest Labs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tests.support.loras import randn, save

RANK = 4
WIDTH = 256
LAYERS = {
    **{f"double_blocks.{i}.{s}_attn.qkv": (3 * WIDTH, WIDTH) for i in range(4) for s in ("img", "txt")},
    **{f"double_blocks.{i}.{s}_attn.proj": (WIDTH, WIDTH) for i in range(4) for s in ("img", "txt")},
    **{f"single_blocks.{i}.linear1": (9 * WIDTH, WIDTH) for i in range(8)},
    **{f"single_blocks.{i}.linear2": (WIDTH, 4 * WIDTH) for i in range(8)},
}
NORMS = [f"double_blocks.3.img_attn.norm.query_norm{end}" for end in (".scale", "")]
"""How earlier and later versions name a scale in LoRAs; each passes over the other's."""

Tensors = dict[str, Tensor]


def _lora(rows: int, columns: int, seed: int) -> Tensors:
    up, down = randn(rows, RANK, seed=seed, scale=0.1), randn(RANK, columns, seed=seed + 1, scale=0.1)
    return {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(2.0)}


def _loha(rows: int, columns: int, seed: int) -> Tensors:
    halves = {f"hada_w{i}_a": randn(rows, RANK, seed=seed + i) for i in (1, 2)}
    return {**halves, **{f"hada_w{i}_b": randn(RANK, columns, seed=seed + 4 + i) for i in (1, 2)}}


def _mid(rows: int, columns: int, seed: int) -> Tensors:
    """A linear layer written as a convolution of one pixel, with a matrix between its two."""
    up, down = randn(rows, RANK, 1, 1, seed=seed), randn(RANK, columns, 1, 1, seed=seed + 1)
    middle = {"lora_mid.weight": randn(RANK, RANK, 1, 1, seed=seed + 2, scale=0.5)}
    return {"lora_up.weight": up, "lora_down.weight": down, **middle, "alpha": torch.tensor(2.0)}


def _loha_tucker(rows: int, columns: int, seed: int) -> Tensors:
    made = {}
    for i in (1, 2):
        made |= {
            f"hada_w{i}_a": randn(RANK, rows, seed=seed + i),
            f"hada_w{i}_b": randn(RANK, columns, seed=seed + 2 + i),
        }
        made[f"hada_t{i}"] = randn(RANK, RANK, 1, 1, seed=seed + 4 + i, scale=1.0)
    return made


def _lokr_tucker(rows: int, columns: int, seed: int) -> Tensors:
    second = {"lokr_w2_a": randn(RANK, rows // 4, seed=seed), "lokr_w2_b": randn(RANK, columns // 4, seed=seed + 1)}
    return {"lokr_w1": randn(4, 4, seed=seed + 2), **second, "lokr_t2": randn(RANK, RANK, 1, 1, seed=seed + 3)}


def _lokr(rows: int, columns: int, seed: int) -> Tensors:
    second = {"lokr_w2_a": randn(rows // 4, RANK, seed=seed), "lokr_w2_b": randn(RANK, columns // 4, seed=seed + 1)}
    return {"lokr_w1": randn(4, 4, seed=seed + 2), **second, "alpha": torch.tensor(2.0)}


def _glora(rows: int, columns: int, seed: int) -> Tensors:
    shapes = {"a1": (columns, RANK), "a2": (RANK, columns), "b1": (rows, RANK), "b2": (RANK, columns)}
    made = {f"{n}.weight": randn(*s, seed=seed + i, scale=0.05) for i, (n, s) in enumerate(shapes.items())}
    return {**made, "alpha": torch.tensor(4.0)}


def _oft(rows: int, columns: int, seed: int) -> Tensors:
    return {"oft_blocks": randn(rows // 8, 8, 8, seed=seed, scale=0.05)}


def _boft(rows: int, columns: int, seed: int) -> Tensors:
    return {"oft_blocks": randn(3, rows // 8, 8, 8, seed=seed, scale=0.05), "alpha": torch.tensor(0.5)}


def _diff(rows: int, columns: int, seed: int) -> Tensors:
    return {"diff": randn(rows, columns, seed=seed, scale=0.02)}


def _set(rows: int, columns: int, seed: int) -> Tensors:
    return {"set_weight": randn(rows, columns, seed=seed, scale=0.05)}


MADE: Mapping[str, Callable[[int, int, int], Tensors]] = {
    "lora": _lora,
    "mid": _mid,
    "loha": _loha,
    "loha with cores": _loha_tucker,
    "lokr": _lokr,
    "glora": _glora,
    "oft": _oft,
    "boft": _boft,
    "diff": _diff,
    "set": _set,
}


def write(folder: Path) -> None:
    """One file per algorithm, for every block; ``norm``, which changes what is no matrix; and two that ComfyUI cannot
    apply: ``bare``, a BOFT LoRA without alpha, and ``core``, a LoKr LoRA with a Tucker core."""
    for name, make in MADE.items():
        state = {}
        for i, (layer, shape) in enumerate(LAYERS.items()):
            state |= {f"diffusion_model.{layer}.{role}": t for role, t in make(*shape, 10 * i).items()}
        save(folder / f"{name}.safetensors", state)
    bare = _boft(WIDTH, WIDTH, 0)["oft_blocks"]
    save(folder / "bare.safetensors", {"diffusion_model.double_blocks.3.img_attn.proj.oft_blocks": bare})
    core = _lokr_tucker(WIDTH, WIDTH, 0)
    save(
        folder / "core.safetensors", {f"diffusion_model.double_blocks.3.img_attn.proj.{k}": t for k, t in core.items()}
    )
    save(folder / "norm.safetensors", {f"diffusion_model.{name}.diff": randn(128, seed=1) for name in NORMS})
