"""Writes mxfp8 as ComfyUI does, with comfy-kitchen's quantiser."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from benchmarks.quantise.marking import Marking, Written, marks


def quantise(tensors: Mapping[str, Tensor], which: Collection[str], marking: Marking = "new") -> Written:
    """``tensors`` with the weights ``which`` as ComfyUI has them.

    Args:
        which: names that end in ``.weight``, of matrices, rows and columns multiples of 32.
    """
    from comfy_kitchen.tensor.mxfp8 import TensorCoreMXFP8Layout

    made, layers = dict(tensors), {}
    for name in which:
        codes, params = TensorCoreMXFP8Layout.quantize(tensors[name])
        made |= {f"{name}{end}": part for end, part in TensorCoreMXFP8Layout.state_dict_tensors(codes, params).items()}
        layers[name.removesuffix(".weight")] = {"format": "mxfp8"}
    extra, metadata = marks(layers, marking)
    return made | extra, metadata
