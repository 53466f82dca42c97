"""The quantiser on the device: tensors [tokens, channels] to symbols [channels, tokens] and back, in one pass.

Elements become whole numbers, the lattice, of steps around their channel's mean. What is coded are symbols from -127 to
127: the lattice itself, or, in channels that are predicted, its change from the tensor before. Both ends keep the
lattice as whole numbers, so that it never drifts, whatever device rounds how. Elements that no symbol stands for keep
the lattice of before and cross exactly beside it.

Triton kernels on CUDA; the same arithmetic in plain torch elsewhere. Must not know coders or payloads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mesh_codec.channels import still, widened
from mesh_codec.spread import describe, settle

RADIUS = 127
"""The largest symbol."""

_FARTHEST = 32767
"""The lattice is int16."""

PERIOD = 65521
"""Of the weights in `fold`: prime, and no size of a chunk that a byte coder cuts, so that exchanged chunks show."""


@dataclass(frozen=True)
class Sides:
    """What both ends have to know of the channels; all on one device.

    Attributes:
        ranks: uint8 [channels].
        means: bfloat16 [channels].
        step: float32, no dimensions.
    """

    ranks: Tensor
    means: Tensor
    step: Tensor

    @classmethod
    def measured(cls, tokens: Tensor, relative_step: float) -> Sides:
        """Those of contiguous ``tokens`` [tokens, channels]; see `mesh_codec.spread`. Waits for no device."""
        if tokens.is_cuda and tokens.shape[1] > 1:
            from mesh_codec.ans import gauges

            deviations, means = gauges.describe(tokens)
            ranks, step = gauges.settle(deviations, relative_step)
        else:
            deviations, means = describe(tokens.t())
            ranks, step = settle(deviations, relative_step)
        return cls(ranks, means, step)


@dataclass(frozen=True)
class Outside:
    """The elements that no symbol stands for.

    Attributes:
        places: int64; the first ``count`` are theirs, in any order, the others are some places. If ``count`` is
            greater than their number, some are not listed.
        count: int64 [1].
    """

    places: Tensor
    count: Tensor


@dataclass(frozen=True)
class Lattice:
    """Attributes, all on the device of the tensors:
    place: int64 [channels], the row of each channel in the coded order.
    means, scales: float32 [channels]; a scale of 0 marks a channel that does not vary.
    inverse: float32 [channels]: steps per unit; infinite where a channel does not vary, so that only its mean is 0.
    """

    place: Tensor
    means: Tensor
    scales: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, sides: Sides) -> Lattice:
        ranks, step = sides.ranks, sides.step
        if ranks.is_cuda:
            from mesh_codec.ans.kernels import tables

            return cls(*tables(ranks, sides.means, step, RADIUS))
        order = ranks.sort(stable=True).indices
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        scales = torch.where(still(ranks, step), 0, widened(ranks, step, RADIUS))
        return cls(place, sides.means.float(), scales, scales.reciprocal())

    def empty(self, tokens: int) -> Tensor:
        """The lattice [channels, tokens] before a chain's first tensor."""
        return torch.zeros(len(self.place), tokens, dtype=torch.int16, device=self.place.device)

    def quantise(self, tokens: Tensor, state: Tensor, predicted: Tensor) -> tuple[Tensor, Outside]:
        """``tokens`` [tokens, channels] -> symbols int8 [channels, tokens] and the elements that they do not stand for.
        ``predicted`` (bool [channels]) are coded as changes from ``state``, which becomes that of this tensor."""
        if tokens.is_cuda:
            from mesh_codec.ans.kernels import quantise

            symbols, *outside = quantise(self, tokens, state, predicted)
            return symbols, Outside(*outside)
        offset = self._offset(tokens).t()
        inside = offset.abs() <= _FARTHEST + 0.5
        lattice = torch.where(inside, offset, 0).round().to(torch.int32)
        base = state[self.place].to(torch.int32) * predicted[:, None]
        symbols = lattice - base
        inside &= (symbols.abs() <= RADIUS) & (lattice.abs() <= _FARTHEST)
        symbols = torch.where(inside, symbols, 0)
        state[self.place] = (base + symbols).to(torch.int16)
        coded = torch.empty(state.shape, dtype=torch.int8, device=state.device)
        coded[self.place] = symbols.to(torch.int8)
        places = (~inside).t().reshape(-1).nonzero().view(-1)
        return coded, Outside(places, torch.tensor([len(places)]))

    def all_outside(self, tokens: Tensor, state: Tensor, outside: Outside, count: int) -> Tensor:
        """The ascending places of all ``count`` elements that ``state``, that of ``tokens``, does not stand for."""
        if count <= len(outside.places):
            return outside.places[:count].sort().values
        near = (self._offset(tokens) - state[self.place].t()).abs_() <= 0.5
        return (~near).view(-1).nonzero().view(-1)

    def _offset(self, tokens: Tensor) -> Tensor:
        """Steps from the channels' means, [tokens, channels]."""
        offset = (tokens.float() - self.means).mul_(self.inverse)
        # The mean of a channel that does not vary gave 0 times infinity.
        return offset.masked_fill_((self.scales == 0) & (tokens == self.means), 0)

    def restore(self, symbols: Tensor, state: Tensor, predicted: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse: [tokens, channels] of ``dtype``; ``state`` becomes that of this tensor."""
        if symbols.is_cuda:
            from mesh_codec.ans.kernels import restore

            return restore(self, symbols, state, predicted, dtype)
        rows = self.place
        base = state[rows].to(torch.int32) * predicted[:, None]
        lattice = base + symbols[rows]
        # Only a payload that was not made by an encoder leaves the range: then both wrap alike.
        state[rows] = lattice.to(torch.int16)
        largest = torch.finfo(dtype).max
        values = lattice.to(torch.int16).float().t() * self.scales + self.means
        return values.clamp_(-largest, largest).to(dtype).contiguous()

    def compare(self, tokens: Tensor, state: Tensor, every: int) -> Tensor:
        """float32 [2, channels], judged by one token in ``every``: the mean sizes of the lattice, and of its change
        from ``state``. Prediction is worth it where the second is smaller."""
        if tokens.is_cuda:
            from mesh_codec.ans import gauges

            return gauges.compare(tokens, state, self.place, self.means, self.inverse, every)
        sample = self._offset(tokens[::every])
        # What will cross exactly has no say.
        sample = sample.masked_fill_(~(sample.abs() <= _FARTHEST), 0)
        before = state[:, ::every][self.place].t()
        return torch.stack([sample.abs().mean(0), (sample - before).abs_().mean(0)])


def fold(data: Tensor) -> Tensor:
    """A number, int64 [1], that damage to flat uint8 ``data`` changes, order included: computed where the data is, so
    that it costs one read of it. Not a signature: it is no help against who means to deceive."""
    if data.is_cuda:
        from mesh_codec.ans import kernels

        return kernels.fold(data, PERIOD)
    # Sums of at most 2**31 products of less than 2**24: nothing wraps.
    weights = torch.arange(1, PERIOD + 1, device=data.device)
    whole = data[: data.numel() // PERIOD * PERIOD].view(-1, PERIOD)
    rest = data[whole.numel() :]
    total = (whole.sum(0, dtype=torch.int64) * weights).sum() + (rest.to(torch.int64) * weights[: len(rest)]).sum()
    return total.view(1)
