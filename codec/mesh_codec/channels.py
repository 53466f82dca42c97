"""The side information of all channels: one buffer, and what both ends work out from it.

Must not know elements, symbols or pixels.
"""

from __future__ import annotations

from math import floor, log2

import numpy as np
import torch
from torch import Tensor

from mesh_codec.errors import CodecCorrupt
from mesh_codec.quantiser import bits_of
from mesh_codec.symbols import expand, squeeze

_REACH = 5.0
"""Deviations that any channel's range holds at least."""


def pack_channels(ranks: Tensor, means: Tensor) -> bytes:
    """uint8 ``ranks`` and bfloat16 ``means`` [channels], on the CPU, as one zstandard frame."""
    return squeeze(np.concatenate([ranks.numpy(), bits_of(means).astype("<u2").view(np.uint8)]))


def read_channels(frame: memoryview, channels: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_channels`.

    Raises:
        CodecCorrupt: damaged, or means that are not finite.
    """
    data = expand(frame, 3 * channels, "channels")
    means = data[channels:].copy().view("<u2")
    # All bits of the exponent: infinite, or not a number.
    if ((means & 0x7F80) == 0x7F80).any():
        raise CodecCorrupt("The channel means of a payload are not finite.")
    return torch.from_numpy(data[:channels].copy()), torch.from_numpy(means.view("<i2")).view(torch.bfloat16)


def widened(ranks: Tensor, step: float | Tensor, radius: int) -> Tensor:
    """float32 [channels]: ``step``, but larger for channels that symbols from -``radius`` to ``radius`` would not hold.

    ``ranks`` are those of `mesh_codec.spread`: quarter octaves of the deviation above the step, counted from 128.
    """
    return (step * torch.exp2((ranks.int() - widest_rank(radius)).clamp_min(0) / 4)).float()


def widest_rank(radius: int) -> int:
    """The rank of the widest channels that symbols from -``radius`` to ``radius`` hold in steps of the common size."""
    return 128 + floor(4 * log2(radius / _REACH))


def still(ranks: Tensor, step: float | Tensor) -> Tensor:
    """bool [channels]: those that do not vary. Such a channel is its mean, and what is not crosses exactly."""
    return (ranks == 0) | (step == 0)
