"""Where a tensor is decides who computes: Triton kernels on CUDA, the same arithmetic in plain torch elsewhere.

Kernels are imported only when a tensor is on CUDA: Triton is not there on every system.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mesh_codec.ans import checksum as plain
from mesh_codec.ans import lattice
from mesh_codec.ans.findings import DeviceFindings
from mesh_codec.ans.lattice import RADIUS, Lattice
from mesh_codec.exact import write_listed


def measure(tokens: Tensor, relative_step: float, findings: DeviceFindings) -> Lattice:
    """`mesh_codec.ans.lattice.measure`, and the lattice of what it found."""
    if tokens.is_cuda and tokens.shape[1] > 1:
        from mesh_codec.ans import measure_kernels

        deviations = measure_kernels.describe(tokens, findings.means)
        return Lattice(*measure_kernels.settle(deviations, relative_step, findings, RADIUS))
    lattice.measure(tokens, relative_step, findings)
    return lattice_of(findings.ranks, findings.means, findings.step)


def lattice_of(ranks: Tensor, means: Tensor, step: Tensor) -> Lattice:
    """`Lattice.of`."""
    if ranks.is_cuda:
        from mesh_codec.ans.kernels import tables

        return Lattice(*tables(ranks, means, step, RADIUS))
    return Lattice.of(ranks, means, step)


def quantise(chosen: Lattice, tokens: Tensor, state: Tensor | None, findings: DeviceFindings) -> Tensor:
    """`Lattice.quantise` of ``chosen``."""
    if tokens.is_cuda:
        from mesh_codec.ans import kernels

        return kernels.quantise(chosen, tokens, state, findings, plain.PERIOD)
    return chosen.quantise(tokens, state, findings)


def restore(chosen: Lattice, symbols: Tensor, state: Tensor, predicted: Tensor, dtype: torch.dtype) -> Tensor:
    """`Lattice.restore` of ``chosen``."""
    if symbols.is_cuda:
        from mesh_codec.ans import kernels

        return kernels.restore(chosen, symbols, state, predicted, dtype)
    return chosen.restore(symbols, state, predicted, dtype)


def compare(chosen: Lattice, tokens: Tensor, state: Tensor, every: int) -> Tensor:
    """`Lattice.compare` of ``chosen``."""
    if tokens.is_cuda:
        from mesh_codec.ans import measure_kernels

        return measure_kernels.compare(tokens, state, chosen.place, chosen.means, chosen.inverse, every)
    return chosen.compare(tokens, state, every)


def write_outside(values: Tensor, listed: Tensor) -> Tensor:
    """``values``, contiguous, with the elements of a `mesh_codec.ans.lattice.listing` written into it."""
    if not len(listed):
        return values
    if values.is_cuda:
        from mesh_codec.ans import kernels

        kernels.write_listed(values, listed)
        return values
    return write_listed(values, listed)


def checksum(data: Tensor, total: Tensor | None = None) -> Tensor:
    """`mesh_codec.ans.checksum.checksum` of ``data``; added to ``total``, int64 [1], if given."""
    total = torch.zeros(1, dtype=torch.int64, device=data.device) if total is None else total
    if data.is_cuda:
        from mesh_codec.ans import kernels

        kernels.checksum(data, total, plain.PERIOD)
    else:
        total += plain.checksum(data)
    return total
