"""The checksum of symbols, in plain torch: one read of them, where they are. Must not know what they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

PERIOD = 65521
"""Of the weights: prime, and no size of a chunk that a byte coder cuts, so that exchanged chunks show."""


def checksum(data: Tensor) -> Tensor:
    """A number, int64 [1], that damage to flat uint8 ``data`` changes, order included: the sum of its bytes, each by a
    weight from 1 to `PERIOD` in turn. No protection against forgery."""
    # Sums of at most 2**31 products of less than 2**24: nothing wraps.
    weights = torch.arange(1, PERIOD + 1, device=data.device)
    whole = data[: data.numel() // PERIOD * PERIOD].view(-1, PERIOD)
    rest = data[whole.numel() :]
    total = (whole.sum(0, dtype=torch.int64) * weights).sum() + (rest.to(torch.int64) * weights[: len(rest)]).sum()
    return total.view(1)
