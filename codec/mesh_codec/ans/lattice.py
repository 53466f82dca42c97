"""The quantiser on the device: tensors [tokens, channels] to symbols [channels, tokens] and back, in one pass.

Elements become whole numbers, the lattice, of steps around their channel's mean. What is coded are symbols from -127 to
127: the lattice itself, or, in channels that are predicted, its change from the tensor before. Both ends keep the
lattice as whole numbers, so that it never drifts, whatever device rounds how. Elements that no symbol stands for keep
the lattice of before and cross exactly beside it.

One Triton kernel each way on CUDA; the same arithmetic in plain torch elsewhere. Must not know coders or payloads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mesh_codec.channels import still, widened
from mesh_codec.quantiser import coded_order

RADIUS = 127
"""The largest symbol."""

_FARTHEST = 32767
"""The lattice is int16."""


@dataclass(frozen=True)
class Lattice:
    """Attributes, all on the device of the tensors:
    place: int64 [channels], the row of each channel in the coded order.
    means, scales: float32 [channels]; a scale of 0 marks a channel that does not vary.
    """

    place: Tensor
    means: Tensor
    scales: Tensor

    @classmethod
    def of(cls, ranks: Tensor, means: Tensor, step: float, device: torch.device) -> Lattice:
        """From the channels' side information, on the CPU: see `mesh_codec.channels`."""
        order = torch.from_numpy(coded_order(ranks.numpy()))
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        scales = torch.where(still(ranks, step), 0, widened(ranks, step, RADIUS))
        return cls(place.to(device), means.float().to(device), scales.to(device))

    @property
    def inverse(self) -> Tensor:
        """float32 [channels]: steps per unit; infinite where a channel does not vary, so that only its mean is 0."""
        return 1 / self.scales

    def empty(self, tokens: int) -> Tensor:
        """The lattice [channels, tokens] before a chain's first tensor."""
        return torch.zeros(len(self.place), tokens, dtype=torch.int16, device=self.place.device)

    def quantise(self, tokens: Tensor, state: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        """``tokens`` [tokens, channels] -> symbols int8 [channels, tokens] and the ascending places, int64, of the
        elements that they do not stand for. ``predicted`` (bool [channels]) are coded as changes from ``state``, which
        becomes that of this tensor."""
        if tokens.is_cuda:
            from mesh_codec.ans.kernels import quantise

            return quantise(self, tokens, state, predicted)
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
        return coded, (~inside).t().reshape(-1).nonzero().view(-1)

    def outside(self, tokens: Tensor, state: Tensor) -> Tensor:
        """The places of the elements that ``state``, which is that of ``tokens``, does not stand for."""
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

    def worth_predicting(self, tokens: Tensor, state: Tensor, every: int) -> tuple[Tensor, Tensor]:
        """Judged by one token in ``every``: bool [channels], whether the change from ``state`` is smaller than the
        lattice; and `sizes`."""
        sample = self._sample(tokens, every)
        before = state[:, ::every][self.place].t().float()
        own = sample.abs().mean(0)
        return (sample - before).abs_().mean(0) < own, own

    def sizes(self, tokens: Tensor, every: int) -> Tensor:
        """float32 [channels]: the mean size of the lattice of one token in ``every``."""
        return self._sample(tokens, every).abs_().mean(0)

    def _sample(self, tokens: Tensor, every: int) -> Tensor:
        # What will cross exactly has no say.
        offset = self._offset(tokens[::every])
        return offset.masked_fill_(~(offset.abs() <= _FARTHEST), 0)
