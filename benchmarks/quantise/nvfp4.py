"""Writes nvfp4 as ComfyUI does, with comfy-kitchen's quantiser, and as diffusers and ModelOpt do, with diffusers' own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.quantise.marking import Where, marking

CONFIG: Mapping[str, Any] = {"quantization_config": {"quant_method": "bfl"}}
"""What ``config.json`` has besides, in a folder of what `quantise_for_diffusers` makes."""


def quantise(
    tensors: Mapping[str, Tensor], chosen: Callable[[str], bool], where: Where = "note"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """ComfyUI's tensors and metadata.

    Args:
        chosen: names of weights, ``X.weight``, to quantise: matrices, rows and columns multiples of 16.
        where: the markers are.
    """
    from comfy_kitchen.tensor.nvfp4 import TensorCoreNVFP4Layout

    made, layers = {}, {}
    for name, tensor in tensors.items():
        if not chosen(name):
            made[name] = tensor
            continue
        codes, params = TensorCoreNVFP4Layout.quantize(tensor)
        made |= {f"{name}{end}": part for end, part in TensorCoreNVFP4Layout.state_dict_tensors(codes, params).items()}
        layers[name.removesuffix(".weight")] = {"format": "nvfp4"}
    extra, metadata = marking(layers, where)
    return made | extra, metadata


def quantise_for_diffusers(tensors: Mapping[str, Tensor], chosen: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors that ``BFLQuantizationConfig`` reads; arguments as for `quantise`, inputs have a scale of 1."""
    from diffusers.quantizers.bfl.utils import quantize_nvfp4

    made = {}
    for name, tensor in tensors.items():
        if not chosen(name):
            made[name] = tensor
            continue
        made[name], made[f"{name}_scale"], made[f"{name}_scale_2"] = quantize_nvfp4(tensor)
        made[f"{name.removesuffix('.weight')}.input_scale"] = torch.ones(())
    return made
