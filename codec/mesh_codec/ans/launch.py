"""Starts Triton kernels with half of Triton's own overhead: the caller's key finds what was compiled.

Triton looks at every argument of every launch for what a kernel is compiled by: its type, whether it is divisible by
16, whether it is 1. That takes tens of microseconds, more than most kernels here run.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton
from torch import Tensor

_DIRECT = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
"""Earlier versions start a compiled kernel with other arguments than it was compiled with."""

_MOST = 4096
"""Compiled kernels that are kept; a program that has more of them sees shapes that do not come back."""

_known: dict[Hashable, Any] = {}


def launch(kernel: Any, grid: tuple[int, int], key: Hashable, *arguments: Any, **options: int) -> None:
    """Start ``kernel`` on the current device and stream.

    Equal keys promise arguments of equal types, equal integers, and tensors of which each begins at a multiple of 16
    bytes in all such calls or in none.
    """
    # Without CUDA it is Triton's interpreter that runs.
    known_as = (kernel, torch.cuda.current_device() if torch.cuda.is_available() else None, key)
    compiled = _known.get(known_as)
    if compiled is not None and _DIRECT:
        compiled[grid[0], grid[1], 1](*arguments)
        return
    if len(_known) >= _MOST:
        _known.clear()
    # Triton's interpreter gives None.
    _known[known_as] = kernel[grid](*arguments, **options)


def aligned(*tensors: Tensor) -> tuple[bool, ...]:
    """The part of a `launch` key that tells which ``tensors`` begin at multiples of 16 bytes."""
    return tuple(tensor.data_ptr() % 16 == 0 for tensor in tensors)
