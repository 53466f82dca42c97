"""Streams of the format ``step-ans``: the lattice, its symbols through a byte coder on the device, temporal prediction.

Buffers: 0 the channels (ranks as uint8, means as bfloat16: a zstandard frame; empty but in key tensors), 1 which
channels are predicted (a bit each; empty in key tensors), 2 the symbols as the byte coder made them, 3 the outliers.
Header: ``dtype``, ``shape``, ``step``, ``outliers`` (their number), ``sum`` (of the symbols, see `fold`),
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
from mesh_codec.ans.fetch import Fetch
from mesh_codec.ans.lattice import Lattice, Sides, fold
from mesh_codec.base import Decoder, Encoded, Encoder, Limits
from mesh_codec.chains import Link, positive_number
from mesh_codec.channels import pack_channels, read_channels
from mesh_codec.errors import CodecCorrupt, CodecStateLost, CodecUnsupported
from mesh_codec.exact import bits_at, outliers_at, outliers_of, write_outliers
from mesh_codec.outliers import MAX_ELEMENTS, read_outliers
from mesh_codec.payload import flat_bytes, form_of, read_form, whole_number
from mesh_codec.quantiser import Grid

_EVERY = 17
"""One token in so many decides what is predicted. Odd: it does not fall in step with image widths."""

_DRIFT = 1.5
"""Growth or decline of the elements' size, since the key tensor, beyond which the channels are measured anew."""

_LARGEST_SUM = (1 << 62) - 1

_FEW = 8192
"""Outliers that are fetched with everything else; more cost a copy of their own."""


@dataclass
class _Chain:
    grid: Grid
    lattice: Lattice
    link: Link
    state: Tensor
    """The lattice of the last tensor."""

    step: float = 0.0

    size: float = 0.0
    """Mean size of the lattice in the key tensor, the encoder's."""


@dataclass(frozen=True)
class _Told:
    """What a payload tells of the channels, still on the device: which are predicted, or, in a key tensor, ``sides``.
    ``size``, the mean of the lattice's, is fetched with them for the encoder."""

    predicted: Tensor
    sides: Sides | None = None
    size: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        if self.sides is None or self.size is None:
            return (self.predicted,)
        return self.sides.ranks, self.sides.means, self.sides.step, self.size

    def buffers(self, chain: _Chain, fetched: list[Tensor]) -> tuple[bytes, bytes]:
        """Those of the channels and of what is predicted, from ``tensors`` on the CPU."""
        if self.sides is None:
            return b"", np.packbits(fetched[0].numpy()).tobytes()
        ranks, means, step, size = fetched
        chain.step, chain.size = float(step), float(size)
        return pack_channels(ranks, means), b""


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
        chain, told = self._continued(tokens, grid) or self._begun(tokens, grid)
        # Whatever fails from here leaves a state that the decoder does not have.
        self._chain = None
        symbols, outside = chain.lattice.quantise(tokens, chain.state, told.predicted)
        data = symbols.view(torch.uint8).view(-1)
        places = outside.places[:_FEW]
        # All that is small comes in one copy, which is on its way while the symbols are coded.
        fetch = Fetch(outside.count, fold(data), places, bits_at(tokens.view(-1), places), *told.tensors)
        frame = self._opened(tokens.device).compress(data)
        count, total, places, bits, *rest = fetch.read()
        channels, flags = told.buffers(chain, rest)
        listed = int(count)
        if listed <= len(places):
            exact = outliers_of(places[:listed], bits[:listed])
        else:
            exact = outliers_at(tokens.view(-1), chain.lattice.all_outside(tokens, chain.state, outside, listed))
        header = (
            form.header()
            | {"step": chain.step, "outliers": len(exact.positions), "sum": int(total)}
            | chain.link.header()
        )
        chain.link = chain.link.next
        self._chain = chain
        return Encoded(header, (channels, flags, frame, exact.to_bytes()), frame)

    def reset(self) -> None:
        self._chain = None

    def _continued(self, tokens: Tensor, grid: Grid) -> tuple[_Chain, _Told] | None:
        """The chain that ``tokens`` continue, if they do."""
        chain = self._chain
        if not chain or not self._temporal or chain.grid != grid or chain.state.device != tokens.device:
            return None
        own, change = chain.lattice.compare(tokens, chain.state, _EVERY)
        if not chain.size / _DRIFT <= float(own.mean()) <= chain.size * _DRIFT:
            return None
        return chain, _Told(change < own)

    def _begun(self, tokens: Tensor, grid: Grid) -> tuple[_Chain, _Told]:
        sides = Sides.measured(tokens, self._relative_step)
        lattice = Lattice.of(sides)
        state = lattice.empty(grid.tokens)
        # Without prediction nothing will ask for it.
        size = lattice.compare(tokens, state, _EVERY)[0].mean() if self._temporal else sides.step
        predicted = torch.zeros(grid.channels, dtype=torch.bool, device=tokens.device)
        return _Chain(grid, lattice, Link.first(), state), _Told(predicted, sides, size)

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
        if int(fold(data)) != total:
            raise CodecCorrupt("The symbols of a payload are damaged: their sum does not match.")
        symbols = data.view(torch.int8).view(chain.grid.channels, chain.grid.tokens)
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
            ranks, means = read_channels(sides, grid.channels, place)
            lattice = Lattice.of(Sides(ranks, means, torch.full((), step, device=place)))
            nothing = torch.zeros(grid.channels, dtype=torch.bool, device=place)
            return _Chain(grid, lattice, link, lattice.empty(grid.tokens), step), nothing
        flat_bytes(sides, 0, "channels")
        chosen = np.unpackbits(np.frombuffer(flat_bytes(flags, -(-grid.channels // 8), "prediction"), np.uint8))
        held = self._chain
        if not held or held.link != link:
            raise CodecStateLost("A payload was predicted from a tensor that this decoder does not have.")
        if held.grid != grid or held.step != step:
            raise CodecCorrupt("A payload was predicted from a tensor of another shape.")
        return held, torch.from_numpy(chosen[: grid.channels].view(np.bool_)).to(place)
