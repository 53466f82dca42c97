"""Writes int8 as ComfyUI does, with comfy-kitchen's quantiser: one scale, one per row, or rotated as well."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from benchmarks.quantise.marking import Marking, Written, marks


def quantise(
    tensors: Mapping[str, Tensor],
    which: Collection[str],
    marking: Marking = "new",
    *,
    per_row: bool = False,
    group: int = 0,
) -> Written:
    """``tensors`` with the weights ``which`` as ComfyUI has them.

    Args:
        which: names that end in ``.weight``, of matrices.
        per_row: a scale for each row.
        group: rotate so many columns together, a power of 4 that divides their number; each row has a scale then.
    """
    from comfy_kitchen.tensor.int8 import TensorWiseINT8Layout

    made, layers = dict(tensors), {}
    for name in which:
        codes, params = TensorWiseINT8Layout.quantize(
            tensors[name], per_channel=per_row or group > 0, convrot=group > 0, convrot_groupsize=group
        )
        made |= {f"{name}{end}": part for end, part in TensorWiseINT8Layout.state_dict_tensors(codes, params).items()}
        rotated = {"convrot": True, "convrot_groupsize": group} if group else {}
        layers[name.removesuffix(".weight")] = {"format": "int8_tensorwise", **rotated}
    extra, metadata = marks(layers, marking)
    return made | extra, metadata
