"""How torch's allocator for NVIDIA GPUs is set up in our own programs. Imports no torch."""

from __future__ import annotations

import os
import sys

_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Of the variable, in newer and in older versions of torch; both read the second."""


def use_growing_segments() -> None:
    """Have memory of a GPU be one piece that grows, unless the user set up the allocator; call it before torch runs.

    Otherwise tensors of many sizes, such as the numbers of stored weights, leave gaps that nothing fits into: blocks
    that fit on a card by their sizes ran out of its memory (benchmarks/results/quantised-dev-fp8mixed-h200.md).
    Windows' driver has no such memory.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in _NAMES):
        os.environ[_NAMES[1]] = "expandable_segments:True"
