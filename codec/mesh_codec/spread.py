"""How the channels of an activation spread, robustly: what the quantiser step and the order of channels follow from.

Must not know buffers or bitstreams. Only encoders measure; decoders read the result in the payload.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLES = 128
"""Per channel. The error of one channel's deviation is 6 %, that of the common step far less."""

MEDIAN_EVERY = 2
"""One sample in so many is used for the medians, which say what is left out: they cost most, and need not be exact."""

CHANNELS = 1024
"""At most so many channels are used for the typical deviation."""

REACH = 6.0
"""A sample farther from its channel's centre, in deviations, is replaced by the centre: a few tokens of massive
activations must not widen the step."""

CAP = 3.0
"""The step follows from the mean of the channels' deviations, each counted as at most so many times the median: a few
channels of massive activations must not widen it for all. Our choice, to be judged by the final picture."""

DEVIATION_PER_MAD = 1.4826
"""Standard deviation of a Gaussian over its median absolute deviation."""

STEP_RANGE = (2.0**-120, 2.0**120)
"""The step and its inverse stay normal float32 numbers."""


@dataclass(frozen=True)
class Spread:
    """Attributes:
    means: bfloat16 [channels], finite; what is subtracted, exactly as the decoder will add it.
    ranks: uint8 [channels]; channels of like deviation have like ranks, a quarter octave each.
    step: the common quantiser step, a float32 number; 0 where no channel varies.
    """

    means: Tensor
    ranks: Tensor
    step: float


def measure(channels: Tensor, relative_step: float) -> Spread:
    """Measure float ``channels`` [channels, tokens], neither empty, on any device.

    The step is ``relative_step`` times the root mean square of the channels' standard deviations, each capped at a
    few times their median, channels that do not vary left out. Non-finite elements count as 0.
    """
    deviations, means = describe(channels)
    ranks, step = settle(deviations, relative_step)
    return Spread(means, ranks, float(step))


def stride_of(channels: int, tokens: int) -> int:
    """One token in so many is sampled."""
    # One channel alone (a tensor that is not split by channel) can afford a sample as large as many channels need.
    wanted = SAMPLES if channels > 1 else SAMPLES * SAMPLES
    # An odd stride does not fall in step with image widths.
    stride = -(-tokens // wanted)
    return stride if stride == 1 else stride | 1


def describe(channels: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation (float64) and mean (bfloat16, finite) of each of the ``channels`` [channels, tokens]."""
    sample = channels[:, :: stride_of(*channels.shape)].double()
    sample = sample.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    few = sample[:, ::MEDIAN_EVERY]
    centre = few.median(dim=1, keepdim=True).values
    typical = (few - centre).abs_().median(dim=1, keepdim=True).values * DEVIATION_PER_MAD
    # A channel that is constant but for a few tokens has no typical deviation: nothing is left out.
    reach = torch.where(typical > 0, typical * REACH, torch.inf)
    sample = torch.where((sample - centre).abs() <= reach, sample, centre)
    deviations, means = torch.std_mean(sample, dim=1, correction=0)
    means = means.bfloat16()
    return deviations, torch.where(means.isfinite(), means, 0)


def settle(deviations: Tensor, relative_step: float) -> tuple[Tensor, Tensor]:
    """The ranks (uint8 [channels]) and the step (float32, no dimensions) of channels of these ``deviations``; both 0
    where none varies. Waits for no device."""
    few = deviations[:: -(-len(deviations) // CHANNELS)]
    typical = torch.where(few > 0, few, torch.nan).nanmedian()
    # None of the few varies: nothing is capped.
    typical = torch.where(typical.isnan(), torch.inf, typical)
    capped = torch.where(deviations > 0, deviations.minimum(typical * CAP), torch.nan)
    lowest, highest = STEP_RANGE
    exact = (relative_step * capped.square().nanmean().sqrt()).clamp(lowest, highest)
    step = torch.where(exact.isnan(), 0, exact).float()
    ranks = (deviations / step).log2_().mul_(4).round_().add_(128).clamp_(0, 255)
    return torch.where(step > 0, ranks, 0).to(torch.uint8), step
