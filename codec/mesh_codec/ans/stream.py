"""Streams of the format ``step-ans``: the lattice, its symbols through a byte coder on the device, temporal prediction.

Buffers: 0 the channels (ranks as uint8, means as bfloat16: a zstandard frame; empty but in key tensors), 1 which
channels are predicted (a bit each; empty in key tensors), 2 the symbols as the byte coder made them, 3 the outliers.
Header: ``dtype``, ``shape``, ``step``, ``outliers`` (their number), ``sum`` (of the symbols, see `checksum`),
``chain`` and ``index`` (see `mesh_codec.chains`). An empty tensor has no buffers.

Must not know which device or coder it works with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesh_codec.ans.coder import LARGEST_SUM, ByteCoder, CoderFactory, check
from mesh_codec.ans.dispatch import compare, lattice_of, measure, quantise, restore, write_outside
from mesh_codec.ans.findings import DeviceFindings, Findings, in_one_copy
from mesh_codec.ans.lattice import Lattice
from mesh_codec.ans.stream_coder import StreamCoder, current_device
from mesh_codec.base import DecodeLimits, Decoder, Encoded, Encoder
from mesh_codec.chains import ChainPosition
from mesh_codec.channels import pack_channels, read_channels
from mesh_codec.errors import CodecCorrupt, CodecStateLost
from mesh_codec.exact import listed, outliers_of
from mesh_codec.lossy import check_lossy_form, read_lossy_form
from mesh_codec.outliers import read_outliers
from mesh_codec.payload import Form, buffers_of, flat_bytes, form_of, positive_number, whole_number
from mesh_codec.quantiser import Grid

_EVERY = 17
"""One token in so many decides what is predicted. Odd: it does not fall in step with image widths."""

_DRIFT = 1.5
"""Growth or decline of the elements' size, since the key tensor, beyond which the channels are measured anew."""


@dataclass
class _LatticeChain:
    grid: Grid
    lattice: Lattice
    position: ChainPosition
    state: Tensor | None = None
    """The lattice of the last tensor, or room for that of the first; None where nothing is held."""

    step: float = 0.0

    size: float = 0.0
    """Mean size of the lattice in the key tensor, the encoder's."""

    def copy(self) -> _LatticeChain:
        """For the next tensor, whose coding changes the state: a stream can go back to this one."""
        return replace(self, state=None if self.state is None else self.state.clone())


class AnsEncoder(Encoder):
    """``relative_step`` is in standard deviations; ``factory`` makes the byte coder."""

    def __init__(self, relative_step: float, temporal: bool, factory: CoderFactory) -> None:
        self._relative_step, self._temporal, self._coder = relative_step, temporal, StreamCoder(factory)
        self._chain: _LatticeChain | None = None
        self._kept: tuple[tuple[Grid, torch.device], DeviceFindings] | None = None

    def encode(self, tensor: Tensor) -> Encoded:
        form = form_of(tensor)
        check_lossy_form(form, "entropy")
        if not form.elements:
            return Encoded(form.header() | {"step": 0.0, "outliers": 0, "sum": 0}, ())
        grid = Grid.of(form)
        tensor, coder = self._coder.for_encoding(tensor.detach())
        tokens = tensor.reshape(grid.tokens, grid.channels).contiguous()
        with current_device(tokens.device):
            return self._coded(tokens, form, grid, coder)

    def _coded(self, tokens: Tensor, form: Form, grid: Grid, coder: ByteCoder) -> Encoded:
        findings = self._findings(grid, tokens.device)
        chain = self._continued(tokens, grid, findings) or self._begun(tokens, grid, findings)
        # If anything below fails, the next tensor is a key one.
        self._chain = None
        symbols = quantise(chain.lattice, tokens, chain.state, findings)
        if chain.position.key and chain.state is not None:
            findings.size.copy_(compare(chain.lattice, tokens, chain.state, _EVERY)[0].mean())
        pending = coder.compress(symbols.view(torch.uint8).view(-1))
        findings.fetch()
        pending.fetch()
        facts = findings.read()
        if not chain.position.key and not chain.size / _DRIFT <= facts.size <= chain.size * _DRIFT:
            return self._coded(tokens, form, grid, coder)
        # While the coded symbols are on their way, the rest is packed.
        exact = outliers_of(self._listed(facts, chain, tokens, symbols), form.dtype.itemsize)
        sides = flags = b""
        if chain.position.key:
            chain.step, chain.size, sides = facts.step, facts.size, pack_channels(facts.ranks, facts.means)
        else:
            flags = np.packbits(facts.predicted).tobytes()
        header = form.header() | {"step": chain.step, "outliers": len(exact.positions), "sum": facts.total}
        header |= chain.position.header()
        chain.position = chain.position.next
        packed = exact.to_bytes()
        findings.clear()
        self._kept = (grid, tokens.device), findings
        frame = pending.read()
        self._chain = chain if self._temporal else None
        return Encoded(header, (sides, flags, frame, packed), frame)

    def reset(self) -> None:
        self._chain = None

    def state(self) -> object:
        return self._chain

    def restore(self, state: object) -> None:
        self._chain = cast(_LatticeChain | None, state)

    def _continued(self, tokens: Tensor, grid: Grid, findings: DeviceFindings) -> _LatticeChain | None:
        """The chain that ``tokens`` continue, if they do; then ``findings`` has what is predicted."""
        chain = self._chain
        if not chain or chain.state is None or chain.grid != grid or chain.state.device != tokens.device:
            return None
        own, change = compare(chain.lattice, tokens, chain.state, _EVERY)
        torch.lt(change, own, out=findings.predicted)
        # Whether the elements have grown too much for this chain is found with everything else, not waited for.
        findings.size.copy_(own.mean())
        return chain.copy()

    def _begun(self, tokens: Tensor, grid: Grid, findings: DeviceFindings) -> _LatticeChain:
        lattice = measure(tokens, self._relative_step, findings)
        return _LatticeChain(
            grid, lattice, ChainPosition.first(), lattice.empty(grid.tokens) if self._temporal else None
        )

    def _findings(self, grid: Grid, device: torch.device) -> DeviceFindings:
        kept, self._kept = self._kept, None
        if kept and kept[0] == (grid, device):
            return kept[1]
        return DeviceFindings(grid.channels, grid.channels * grid.tokens, device)

    def _listed(self, facts: Findings, chain: _LatticeChain, tokens: Tensor, symbols: Tensor) -> NDArray[np.int64]:
        if facts.listed is not None:
            return facts.listed
        return chain.lattice.outside(tokens, symbols if chain.state is None else chain.state).cpu().numpy()


class AnsDecoder(Decoder):
    """The other end of `AnsEncoder`; whether tensors are predicted, each payload says itself."""

    def __init__(self, limits: DecodeLimits, factory: CoderFactory) -> None:
        self._limits, self._coder = limits, StreamCoder(factory)
        self._chain: _LatticeChain | None = None

    def decode(self, encoded: Encoded, device: torch.device | str = "cpu") -> Tensor:
        form = read_lossy_form(encoded.header, self._limits, "entropy")
        buffers = buffers_of(encoded, form, 4)
        if not buffers:
            return form.empty(device)
        place, coder = self._coder.for_decoding(device)
        with current_device(place):
            return self._decoded(encoded.header, buffers, form, coder, place).view(form.shape).to(device)

    def _decoded(
        self,
        header: Mapping[str, Any],
        buffers: tuple[memoryview, ...],
        form: Form,
        coder: ByteCoder,
        place: torch.device,
    ) -> Tensor:
        sides, flags, frame, exact = buffers
        data, checks = coder.expand(frame, form.elements)
        # While the device works, the rest is read.
        total = whole_number(header, "sum", LARGEST_SUM)
        count = whole_number(header, "outliers", form.elements)
        outliers = listed(read_outliers(exact, count, form.dtype.itemsize, form.elements), place)
        chain, predicted = self._prepared(header, Grid.of(form), sides, flags, place)
        if not chain.position.key:
            check(checks, total)
            chain = chain.copy()
        symbols = data.view(torch.int8).view(chain.grid.channels, chain.grid.tokens)
        if chain.state is None:
            chain.state = chain.lattice.empty(chain.grid.tokens)
        values = restore(chain.lattice, symbols, chain.state, predicted, form.dtype.torch)
        write_outside(values, outliers)
        if chain.position.key:
            check(checks, total)
        chain.position = chain.position.next
        self._chain = chain
        return values

    def reset(self) -> None:
        self._chain = None

    def state(self) -> object:
        return self._chain

    def restore(self, state: object) -> None:
        self._chain = cast(_LatticeChain | None, state)

    def _prepared(
        self, header: Mapping[str, Any], grid: Grid, sides: memoryview, flags: memoryview, place: torch.device
    ) -> tuple[_LatticeChain, Tensor]:
        position, step = ChainPosition.read(header), positive_number(header, "step")
        if position.key:
            flat_bytes(flags, 0, "prediction")
            ranks, means = read_channels(sides, grid.channels)
            there, ranks, means, nothing = in_one_copy(ranks, means, step, place)
            return _LatticeChain(grid, lattice_of(ranks, means, there), position, step=step), nothing
        flat_bytes(sides, 0, "channels")
        chosen = np.unpackbits(np.frombuffer(flat_bytes(flags, -(-grid.channels // 8), "prediction"), np.uint8))
        held = self._chain
        if not held or held.position != position:
            raise CodecStateLost("A payload was predicted from a tensor that this decoder does not have.")
        if held.grid != grid or held.step != step:
            raise CodecCorrupt("A payload was predicted from a tensor of another shape.")
        return held, torch.from_numpy(chosen[: grid.channels].view(np.bool_)).to(place, non_blocking=True)
