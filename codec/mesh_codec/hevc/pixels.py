"""Elements to pixels and back: a clipped uniform quantiser around each channel's mean.

All channels share one step; those that would not fit the pixel's range with it have a larger one. What is out of
range all the same, and what is not finite, is the caller's to send exactly. Must not know frames or bitstreams.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mesh_codec.channels import still, widened
from mesh_codec.spread import measure

PIXELS_PER_DEVIATION = 16
"""With 8 bits: a common channel reaches to 8 deviations. 10 bits refine the step, at the same reach."""

_DRIFT = 1.5
"""Growth or decline of the step beyond which prediction from before is given up for a fresh calibration."""


@dataclass(frozen=True)
class Calibration:
    """What both ends know of the channels while a stream predicts from earlier tensors.

    Attributes:
        means: bfloat16 [channels], on the CPU; ranks: uint8 [channels]; step: as in `Spread`.
        bits: of a pixel.
    """

    means: Tensor
    ranks: Tensor
    step: float
    bits: int

    @classmethod
    def measured(cls, channels: Tensor, bits: int) -> Calibration:
        """From float ``channels`` [channels, tokens], neither empty."""
        spread = measure(channels, 1 / (PIXELS_PER_DEVIATION << (bits - 8)))
        return cls(spread.means.cpu(), spread.ranks.cpu(), spread.step, bits)

    def scales(self) -> Tensor:
        """float32 [channels, 1]: the value of one pixel step."""
        return widened(self.ranks, self.step, 1 << (self.bits - 1))[:, None]

    def to_pixels(self, channels: Tensor) -> tuple[Tensor, Tensor]:
        """Float ``channels`` [channels, tokens] -> pixels (int16) and a mask of the elements that no pixel stands
        for; theirs is the middle."""
        half = 1 << (self.bits - 1)
        fixed = self._fixed(channels.device)
        means, scales = self.means.float()[:, None].to(channels.device), self.scales().to(channels.device)
        values = channels.float()
        offset = (values - means).div_(scales).round_()
        # A NaN makes any comparison false. A channel that does not vary is its mean, and what is not crosses exactly.
        inside = torch.where(fixed, values == means, (offset >= -half) & (offset < half))
        pixels = torch.where(inside & ~fixed, offset, 0).to(torch.int16)
        return pixels.add_(half), ~inside

    def to_values(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """``pixels`` [channels, tokens] -> elements of ``dtype``."""
        half = 1 << (self.bits - 1)
        values = (pixels.to(torch.int16) - half).float()
        values *= torch.where(self._fixed(pixels.device), 0, self.scales().to(pixels.device))
        values += self.means.float()[:, None].to(pixels.device)
        largest = torch.finfo(dtype).max
        return values.clamp_(-largest, largest).to(dtype)

    def fits(self, other: Calibration) -> bool:
        """Whether tensors measured as ``other`` may still be coded with this one."""
        if not self.step or not other.step:
            return self.step == other.step
        return 1 / _DRIFT <= other.step / self.step <= _DRIFT

    def _fixed(self, device: torch.device) -> Tensor:
        return still(self.ranks, self.step)[:, None].to(device)
