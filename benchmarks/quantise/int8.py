"""Writes int8 as ComfyUI does, with comfy-kitchen's quantiser: one scale, one per row, or rotated as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from benchmarks.quantise.marking import Where, marking


def quantise(
    tensors: Mapping[str, Tensor],
    chosen: Callable[[str], bool],
    where: Where = "note",
    *,
    per_row: bool = False,
    group: int = 0,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata.

    Args:
        chosen: names of weights, ``X.weight``, to quantise: matrices.
        where: the markers are.
        per_row: a scale for each row.
        group: rotate so many columns together, a power of 4 that divides their number; each row has a scale then.
    """
    from comfy_kitchen.tensor.int8 import TensorWiseINT8Layout

    made, layers = {}, {}
    for name, tensor in tensors.items():
        if not chosen(name):
            made[name] = tensor
            continue
        codes, params = TensorWiseINT8Layout.quantize(
            tensor, per_channel=per_row or group > 0, convrot=group > 0, convrot_groupsize=group
        )
        made |= {f"{name}{end}": part for end, part in TensorWiseINT8Layout.state_dict_tensors(codes, params).items()}
        rotated = {"convrot": True, "convrot_groupsize": group} if group else {}
        layers[name.removesuffix(".weight")] = {"format": "int8_tensorwise", **rotated}
    extra, metadata = marking(layers, where)
    return made | extra, metadata
