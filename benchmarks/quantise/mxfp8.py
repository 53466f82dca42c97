"""Writes mxfp8 as ComfyUI does, with comfy-kitchen's quantiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from benchmarks.quantise.marking import Where, marking


def quantise(
    tensors: Mapping[str, Tensor], chosen: Callable[[str], bool], where: Where = "note"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata.

    Args:
        chosen: names of weights, ``X.weight``, to quantise: matrices, rows and columns multiples of 32.
        where: the markers are.
    """
    from comfy_kitchen.tensor.mxfp8 import TensorCoreMXFP8Layout

    made, layers = {}, {}
    for name, tensor in tensors.items():
        if not chosen(name):
            made[name] = tensor
            continue
        codes, params = TensorCoreMXFP8Layout.quantize(tensor)
        made |= {f"{name}{end}": part for end, part in TensorCoreMXFP8Layout.state_dict_tensors(codes, params).items()}
        layers[name.removesuffix(".weight")] = {"format": "mxfp8"}
    extra, metadata = marking(layers, where)
    return made | extra, metadata
