"""What the arguments of a call need on their way: their layout in memory, and a refusal of what cannot cross a cut.

Pipelines pass latents whose dimensions are permuted in memory, and matrix libraries give other last bits for these.
Tensors cross a cut in row-major order, so the layout of the model's input goes along as an option.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mesh_core.errors import UnsupportedInput, WireMalformed


def refuse_attention_arguments(inputs: Mapping[str, Any], name: str) -> None:
    """Refuse what ``inputs[name]``, a dict for attention processors or None, asks for; a scale of 1 asks for nothing.

    Raises:
        UnsupportedInput: names the arguments.
    """
    asked = {k: v for k, v in (inputs.get(name) or {}).items() if (k, v) != ("scale", 1.0)}
    if asked:
        raise UnsupportedInput(
            f"{name} {sorted(asked)} cannot cross a cut.", hint="the call without them, or unsplit()"
        )


def unusual_strides(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Options that say how those of ``tensors`` lie in memory that are not in row-major order, by ``NAME_strides``.

    A tensor with gaps or overlaps, such as an expanded one, counts as row-major: it becomes so on the way.
    """
    return {f"{n}_strides": list(t.stride()) for n, t in tensors.items() if not t.is_contiguous() and _dense(t)}


def restore_strides(tensor: Tensor, name: str, options: Mapping[str, Any]) -> Tensor:
    """``tensor`` with the strides that `unusual_strides` put among ``options``; itself if there are none, or if it
    has them.

    Raises:
        WireMalformed: no strides, or some that do not fit its shape.
    """
    strides = options.get(f"{name}_strides")
    if strides is None or list(tensor.stride()) == strides:
        return tensor
    whole = isinstance(strides, list) and all(type(s) is int and 0 < s <= tensor.numel() for s in strides)
    if not whole or len(strides) != tensor.ndim:
        raise WireMalformed(f"{name} came with strides that are not one whole number per dimension.")
    with torch.device("meta"):
        planned = torch.empty_strided(tensor.shape, strides)
    if not _dense(planned):
        raise WireMalformed(f"{name} came with strides that do not fit its shape.")
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory, each once."""
    expected = 1
    for stride, size in sorted((st, si) for st, si in zip(tensor.stride(), tensor.shape, strict=True) if si != 1):
        if stride != expected:
            return False
        expected *= size
    return True
