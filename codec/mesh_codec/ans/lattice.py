"""The quantiser on the device: tensors [tokens, channels] to symbols [channels, tokens] and back, in one pass.

Elements become whole numbers, the lattice, of steps around their channel's mean. What is coded are symbols from -127 to
127: the lattice itself, or, in channels that are predicted, its change from the tensor before. Both ends keep the
lattice as whole numbers, so that it never drifts, whatever device rounds how. Elements that no symbol stands for keep
the lattice of before and cross exactly beside it.

Plain torch, which says what is right; `mesh_codec.ans.kernels` is the same arithmetic for CUDA, and
`mesh_codec.ans.dispatch` chooses. Must not know coders or payloads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mesh_codec.ans.checksum import checksum
from mesh_codec.ans.findings import DeviceFindings
from mesh_codec.channels import still, widened
from mesh_codec.exact import bits_at
from mesh_codec.spread import describe, settle

RADIUS = 127
"""The largest symbol."""

_FARTHEST = 32767
"""The lattice is int16."""


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
    def of(cls, ranks: Tensor, means: Tensor, step: Tensor) -> Lattice:
        """From what both ends know: uint8, bfloat16 and float32 [channels], [channels] and [1], on one device."""
        order = ranks.sort(stable=True).indices
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        scales = torch.where(still(ranks, step), 0, widened(ranks, step, RADIUS))
        return cls(place, means.float(), scales, scales.reciprocal())

    def empty(self, tokens: int) -> Tensor:
        """Room for the lattice [channels, tokens] of a chain's first tensor, of which nothing is predicted."""
        return torch.empty(len(self.place), tokens, dtype=torch.int16, device=self.place.device)

    def quantise(self, tokens: Tensor, state: Tensor | None, findings: DeviceFindings) -> Tensor:
        """Contiguous ``tokens`` [tokens, channels] -> symbols int8 [channels, tokens].

        Channels that are ``predicted`` by the ``findings`` are coded as changes from ``state``, which becomes that of
        this tensor; without a state the symbols are the lattice. Writes into ``findings`` the elements that no symbol
        stands for, and the `checksum` of the symbols.
        """
        offset = self._offset(tokens).t()
        inside = offset.abs() < _FARTHEST + 0.5
        lattice = torch.where(inside, offset, 0).round().to(torch.int32)
        base = torch.zeros_like(lattice)
        if state is not None:
            base += state[self.place] * findings.predicted[:, None]
        symbols = lattice - base
        inside &= symbols.abs() <= RADIUS
        symbols = torch.where(inside, symbols, 0)
        if state is not None:
            state[self.place] = (base + symbols).to(torch.int16)
        coded = torch.empty(symbols.shape, dtype=torch.int8, device=symbols.device)
        coded[self.place] = symbols.to(torch.int8)
        places = (~inside).t().reshape(-1).nonzero().view(-1)
        findings.count.fill_(len(places))
        entries = listing(places, bits_at(tokens.view(-1), places))[: len(findings.listed)]
        findings.listed[: len(entries)] = entries
        findings.total.copy_(checksum(coded.view(torch.uint8).view(-1)))
        return coded

    def outside(self, tokens: Tensor, state: Tensor) -> Tensor:
        """The `listing` of all elements that ``state``, that of ``tokens``, does not stand for."""
        near = (self._offset(tokens) - state[self.place].t()).abs_() <= 0.5
        places = (~near).view(-1).nonzero().view(-1)
        return listing(places, bits_at(tokens.view(-1), places))

    def _offset(self, tokens: Tensor) -> Tensor:
        """Steps from the channels' means, [tokens, channels]."""
        offset = (tokens.float() - self.means).mul_(self.inverse)
        # The mean of a channel that does not vary gave 0 times infinity.
        return offset.masked_fill_((self.scales == 0) & (tokens == self.means), 0)

    def restore(self, symbols: Tensor, state: Tensor, predicted: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse: [tokens, channels] of ``dtype``; ``state`` becomes that of this tensor."""
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
        sample = self._offset(tokens[::every])
        # Elements that will cross exactly are left out.
        sample = sample.masked_fill_(~(sample.abs() <= _FARTHEST), 0)
        before = state[:, ::every][self.place].t()
        return torch.stack([sample.abs().mean(0), (sample - before).abs_().mean(0)])


def listing(places: Tensor, bits: Tensor) -> Tensor:
    """int64 [n]: places in the upper half, bits of the elements there in the lower."""
    return (places << 32) | (bits.to(torch.int64) & 0xFFFFFFFF)


def measure(tokens: Tensor, relative_step: float, findings: DeviceFindings) -> None:
    """Write ranks, means and step of contiguous ``tokens`` [tokens, channels] into ``findings``; see
    `mesh_codec.spread`. Waits for no device."""
    deviations, means = describe(tokens.t())
    ranks, step = settle(deviations, relative_step)
    findings.means.copy_(means)
    findings.ranks.copy_(ranks)
    findings.step.copy_(step)
