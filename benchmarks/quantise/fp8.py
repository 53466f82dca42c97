"""Writes 8-bit floats as converters do: plain, with one scale in each of ComfyUI's markings, and with one per row."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.quantise.marking import Written, marks

Marking = Literal["new", "metadata", "old"]
"""``new``: a tensor ``comfy_quant`` beside each weight. ``metadata``: a note in the header. ``old``: ``scaled_fp8``."""

_FORMATS = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}


def fp8_cast(
    tensors: Mapping[str, Tensor], names: Collection[str], dtype: torch.dtype = torch.float8_e4m3fn
) -> dict[str, Tensor]:
    """``tensors`` with those called ``names`` as the nearest 8-bit floats; numbers too large become the largest."""
    most = torch.finfo(dtype).max
    return {
        name: tensor.float().clamp(-most, most).to(dtype) if name in names else tensor
        for name, tensor in tensors.items()
    }


def fp8_scaled(
    tensors: Mapping[str, Tensor],
    which: Collection[str],
    marking: Marking = "new",
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    input_scales: Mapping[str, float] | None = None,
    full_precision: bool = False,
) -> Written:
    """``tensors`` with the weights ``which`` (names that end in ``.weight``) divided by their largest magnitude.

    Args:
        input_scales: of layers that have one, by the name of their weight.
        full_precision: the file says that inputs are never to be quantised.
    """
    scale_name, input_name = ("scale_weight", "scale_input") if marking == "old" else ("weight_scale", "input_scale")
    made, layers = dict(tensors), {}
    said: dict[str, Any] = {"format": _FORMATS[dtype]}
    if full_precision:
        said["full_precision_matrix_mult"] = True
    for name in which:
        layer = name.removesuffix(".weight")
        made[name], made[f"{layer}.{scale_name}"] = _with_one_scale(tensors[name], dtype)
        if name in (input_scales or {}):
            made[f"{layer}.{input_name}"] = torch.tensor((input_scales or {})[name])
        layers[layer] = said
    if marking == "old":
        return made | {"scaled_fp8": torch.zeros(2 if full_precision else 0).to(dtype)}, {}
    extra, metadata = marks(layers, marking)
    return made | extra, metadata


def fp8_rows(tensors: Mapping[str, Tensor], which: Collection[str]) -> Written:
    """``tensors`` with the weights ``which`` divided by the largest magnitude of each of their rows."""
    made, most = dict(tensors), torch.finfo(torch.float8_e4m3fn).max
    for name in which:
        numbers = tensors[name].float()
        scale = (numbers.abs().amax(dim=1) / most).clamp(min=1e-12)
        made[name] = (numbers / scale[:, None]).clamp(-most, most).to(torch.float8_e4m3fn)
        made[f"{name}_scale"] = scale
    return made, {}


def _with_one_scale(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """In float32 and rounded to nearest, however the numbers came."""
    numbers, most = tensor.float(), torch.finfo(dtype).max
    scale = (numbers.abs().max() / most).clamp(min=1e-12)
    return (numbers / scale).clamp(-most, most).to(dtype), scale
