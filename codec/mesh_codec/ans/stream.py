"""Streams of the format ``step-ans``: the lattice, its symbols through a byte coder on the device, temporal prediction.

Buffers: 0 the channels (ranks as uint8, means as bfloat16: a zstandard frame; empty but in key tensors), 1 which
channels are predicted (a bit each; empty in key tensors), 2 the symbols as the byte coder made them, 3 the outliers.
Header: ``dtype``, ``shape``, ``step``, ``outliers`` (their number), ``sum`` (of the symbols, see `fingerprint`),
``chain`` and ``index`` (see `mesh_codec.chains`). An empty tensor has no buffers.

Must not know which device or coder it works with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mesh_codec.ans.coder import ByteCoder, CoderFactory
from mesh_codec.ans.lattice import Lattice
from mesh_codec.base import Decoder, Encoded, Encoder, Limits
from mesh_codec.chains import Link, positive_number
from mesh_codec.channels import pack_channels, read_channels
from mesh_codec.errors import CodecCorrupt, CodecStateLost, CodecUnsupported
from mesh_codec.exact import outliers_at, write_outliers
from mesh_codec.outliers import MAX_ELEMENTS, read_outliers
from mesh_codec.payload import flat_bytes, form_of, read_form, whole_number
from mesh_codec.quantiser import Grid
from mesh_codec.spread import measure

_EVERY = 17
"""One token in so many decides what is predicted. Odd: it does not fall in step with image widths."""

_DRIFT = 1.5
"""Growth or decline of the elements' size, since the key tensor, beyond which the channels are measured anew."""

_LARGEST_SUM = (1 << 62) - 1


@dataclass
class _Chain:
    grid: Grid
    step: float
    lattice: Lattice
    link: Link
    state: Tensor | None = None
    """The lattice of the last tensor; None before the first one."""

    size: float = 0.0
    """Mean size of the lattice in the key tensor, the encoder's."""


class AnsEncoder(Encoder):
    def __init__(self, relative_step: float, temporal: bool, factory: CoderFactory) -> None:
        self._relative_step, self._temporal, self._factory = relative_step, temporal, factory
        self._chain: _Chain | None = None
        self._coder: tuple[torch.device, ByteCoder] | None = None

    def encode(self, tensor: Tensor) -> Encoded:
        form = form_of(tensor)
        if not form.dtype.lossy or form.elements > MAX_ELEMENTS:
            raise CodecUnsupported(
                f"The entropy codec does not carry {form.elements} elements of {form.dtype.name}.", hint="the raw codec"
            )
        if not form.elements:
            return Encoded(form.header() | {"step": 0.0, "outliers": 0, "sum": 0}, ())
        grid = Grid.of(form)
        tokens = self._on_device(tensor.detach()).reshape(grid.tokens, grid.channels).contiguous()
        chain, predicted, sides = self._prepared(tokens, grid)
        # Whatever fails from here leaves a state that the decoder does not have.
        self._chain = None
        if chain.state is None:
            chain.state = chain.lattice.empty(grid.tokens)
        symbols, places = chain.lattice.quantise(tokens, chain.state, predicted)
        data = symbols.view(torch.uint8).view(-1)
        total = fingerprint(data)
        frame = self._opened(tokens.device).compress(data)
        flags = b"" if chain.link.key else np.packbits(predicted.cpu().numpy()).tobytes()
        exact = outliers_at(tokens.view(-1), places)
        header = form.header() | {"step": chain.step, "outliers": len(exact.positions), "sum": total}
        header |= chain.link.header()
        chain.link = chain.link.next
        self._chain = chain
        return Encoded(header, (sides, flags, frame, exact.to_bytes()), frame)

    def reset(self) -> None:
        self._chain = None

    def _prepared(self, tokens: Tensor, grid: Grid) -> tuple[_Chain, Tensor, bytes]:
        """The chain that ``tokens`` continue, or a new one; which channels are predicted; the channels' buffer."""
        chain = self._chain
        state = chain.state if chain and chain.grid == grid else None
        if chain and self._temporal and state is not None and state.device == tokens.device:
            predicted, size = chain.lattice.worth_predicting(tokens, state, _EVERY)
            now = float(size.mean())
            if chain.size / _DRIFT <= now <= chain.size * _DRIFT:
                return chain, predicted, b""
        spread = measure(tokens.t(), self._relative_step)
        ranks, means = spread.ranks.cpu(), spread.means.cpu()
        lattice = Lattice.of(ranks, means, spread.step, tokens.device)
        chain = _Chain(grid, spread.step, lattice, Link.first())
        if self._temporal:
            chain.size = float(lattice.sizes(tokens, _EVERY).mean())
        nothing = torch.zeros(grid.channels, dtype=torch.bool, device=tokens.device)
        return chain, nothing, pack_channels(ranks, means)

    def _on_device(self, tensor: Tensor) -> Tensor:
        try:
            self._opened(tensor.device)
        except CodecUnsupported:
            return tensor.to(self._factory.device())
        return tensor

    def _opened(self, device: torch.device) -> ByteCoder:
        if not self._coder or self._coder[0] != device:
            self._coder = device, self._factory.open(device)
        return self._coder[1]


class AnsDecoder(Decoder):
    def __init__(self, limits: Limits, factory: CoderFactory) -> None:
        self._limits, self._factory = limits, factory
        self._chain: _Chain | None = None
        self._coder: tuple[torch.device, ByteCoder] | None = None

    def decode(self, encoded: Encoded, device: torch.device | str = "cpu") -> Tensor:
        header, form = encoded.header, read_form(encoded.header, self._limits)
        if not form.dtype.lossy or form.elements > MAX_ELEMENTS:
            raise CodecCorrupt(f"A payload announces {form.elements} elements of {form.dtype.name}: not entropy coded.")
        expected = 4 if form.elements else 0
        if len(encoded.buffers) != expected:
            raise CodecCorrupt(f"A coded tensor came in {len(encoded.buffers)} buffers where {expected} belong.")
        if not expected:
            return torch.empty(form.shape, dtype=form.dtype.torch, device=device)
        sides, flags, frame, exact = (flat_bytes(b, None, "payload") for b in encoded.buffers)
        count = whole_number(header, "outliers", form.elements)
        total = whole_number(header, "sum", _LARGEST_SUM)
        outliers = read_outliers(exact, count, form.dtype.itemsize, form.elements)
        place, coder = self._opened(device)
        chain, predicted = self._prepared(header, Grid.of(form), sides, flags, place)
        data = coder.expand(frame, form.elements)
        if fingerprint(data) != total:
            raise CodecCorrupt("The symbols of a payload are damaged: their sum does not match.")
        symbols = data.view(torch.int8).view(chain.grid.channels, chain.grid.tokens)
        if chain.state is None:
            chain.state = chain.lattice.empty(chain.grid.tokens)
        values = chain.lattice.restore(symbols, chain.state, predicted, form.dtype.torch)
        chain.link = chain.link.next
        self._chain = chain
        return write_outliers(values.view(form.shape), outliers).to(device)

    def reset(self) -> None:
        self._chain = None

    def _opened(self, wanted: torch.device | str) -> tuple[torch.device, ByteCoder]:
        """Where this stream decodes, and with what: where its first tensor is wanted, if coders work there."""
        if not self._coder:
            place = torch.empty(0, device=wanted).device
            if place.type != self._factory.device().type:
                place = self._factory.device()
            self._coder = place, self._factory.open(place)
        return self._coder

    def _prepared(
        self, header: Mapping[str, Any], grid: Grid, sides: memoryview, flags: memoryview, place: torch.device
    ) -> tuple[_Chain, Tensor]:
        link, step = Link.read(header), positive_number(header, "step")
        if link.key:
            flat_bytes(flags, 0, "prediction")
            ranks, means = read_channels(sides, grid.channels)
            lattice = Lattice.of(ranks, means, step, place)
            return _Chain(grid, step, lattice, link), torch.zeros(grid.channels, dtype=torch.bool, device=place)
        flat_bytes(sides, 0, "channels")
        chosen = np.unpackbits(np.frombuffer(flat_bytes(flags, -(-grid.channels // 8), "prediction"), np.uint8))
        held = self._chain
        if not held or held.link != link:
            raise CodecStateLost("A payload was predicted from a tensor that this decoder does not have.")
        if held.grid != grid or held.step != step:
            raise CodecCorrupt("A payload was predicted from a tensor of another shape.")
        return held, torch.from_numpy(chosen[: grid.channels]).bool().to(place)


def fingerprint(data: Tensor) -> int:
    """A number from 0 to 2**62 that damage to uint8 ``data`` [n] changes, order included: computed where the data is,
    so that it costs one read of it. Not a signature: it is no help against who means to deceive."""
    width = 1 << 12
    whole = data[: data.numel() // width * width].view(-1, width)
    sums = torch.cat([whole.sum(1, dtype=torch.int64), data[whole.numel() :].sum(dtype=torch.int64)[None]])
    across = whole.sum(0, dtype=torch.int64)
    places = torch.arange(1, max(len(sums), width) + 1, device=data.device)
    # Products of less than 2**33, sums of less than 2**53 for 2**31 elements: nothing wraps.
    down = (sums * (places[: len(sums)] % 8191 + 1)).sum()
    along = (across * (places[:width] % 4093 + 1)).sum()
    tail = (data[whole.numel() :].to(torch.int64) * places[: data.numel() - whole.numel()]).sum()
    rows, columns, rest = torch.stack([down, along, tail]).tolist()
    return int((rows + 1_000_003 * columns + 1_000_000_007 * rest) % ((1 << 61) - 1))
