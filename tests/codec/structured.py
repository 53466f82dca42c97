"""Activations of our making: correlated channels with a falling spectrum, and a few that are massive."""

from __future__ import annotations

import torch
from torch import Tensor


def activations(tokens: int, channels: int, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[tokens, channels]: a tenth as many latent directions as channels, whose deviations fall as 1/sqrt(rank), on a
    white floor; log-normal channel gains; means as large as the deviations."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rank = max(1, channels // 10)
    spectrum = torch.arange(1, rank + 1) ** -0.5
    mixed = (normal(tokens, rank) * spectrum) @ normal(rank, channels) / spectrum.norm()
    gains = torch.exp(0.6 * normal(channels))
    return ((0.7 * mixed + 0.7 * normal(tokens, channels)) * gains + normal(channels) * gains).to(dtype)
