"""Writes nvfp4 as ComfyUI does, with comfy-kitchen's quantiser, and as ModelOpt does, with diffusers' own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.quantise.marking import Marking, Written, marks

CONFIG: Mapping[str, Any] = {"quantization_config": {"quant_method": "bfl"}}
"""What ``config.json`` has besides, in a folder of what `quantise_for_diffusers` makes."""


def quantise(tensors: Mapping[str, Tensor], which: Collection[str], marking: Marking = "new") -> Written:
    """``tensors`` with the weights ``which`` as ComfyUI has them.

    Args:
        which: names that end in ``.weight``, of matrices, rows and columns multiples of 16.
    """
    from comfy_kitchen.tensor.nvfp4 import TensorCoreNVFP4Layout

    made, layers = dict(tensors), {}
    for name in which:
        codes, params = TensorCoreNVFP4Layout.quantize(tensors[name])
        made |= {f"{name}{end}": part for end, part in TensorCoreNVFP4Layout.state_dict_tensors(codes, params).items()}
        layers[name.removesuffix(".weight")] = {"format": "nvfp4"}
    extra, metadata = marks(layers, marking)
    return made | extra, metadata


def quantise_for_diffusers(tensors: Mapping[str, Tensor], which: Collection[str]) -> dict[str, Tensor]:
    """The tensors that ``BFLQuantizationConfig`` reads; arguments as for `quantise`, inputs have a scale of 1."""
    from diffusers.quantizers.bfl.utils import quantize_nvfp4

    made = dict(tensors)
    for name in which:
        made[name], made[f"{name}_scale"], made[f"{name}_scale_2"] = quantize_nvfp4(tensors[name])
        made[f"{name.removesuffix('.weight')}.input_scale"] = torch.ones(())
    return made
