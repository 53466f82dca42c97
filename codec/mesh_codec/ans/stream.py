"""Streams of the format ``step-ans``: the lattice, its symbols through a byte coder on the device, temporal prediction.

Buffers: 0 the channels (ranks as uint8, means as bfloat16: a zstandard frame; empty but in key tensors), 1 which
channels are predicted (a bit each; empty in key tensors), 2 the symbols as the byte coder made them, 3 the outliers.
Header: ``dtype``, ``shape``, ``step``, ``outliers`` (their number), ``sum`` (of the symbols, see `fold`),
``chain`` and ``index`` (see `mesh_codec.chains`). An empty tensor has no buffers.

Must not know which device or coder it works with.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesh_codec.ans.coder import ByteCoder, CoderFactory
from mesh_codec.ans.lattice import Lattice, fold, measure
from mesh_codec.ans.told import Facts, Told
from mesh_codec.base import Decoder, Encoded, Encoder, Limits
from mesh_codec.chains import Link, positive_number
from mesh_codec.channels import pack_channels, read_channels
from mesh_codec.errors import CodecCorrupt, CodecStateLost, CodecUnsupported
from mesh_codec.exact import outliers_of, write_outliers
from mesh_codec.outliers import MAX_ELEMENTS, read_outliers
from mesh_codec.payload import Form, flat_bytes, form_of, read_form, whole_number
from mesh_codec.quantiser import Grid

_EVERY = 17
"""One token in so many decides what is predicted. Odd: it does not fall in step with image widths."""

_DRIFT = 1.5
"""Growth or decline of the elements' size, since the key tensor, beyond which the channels are measured anew."""

_LARGEST_SUM = (1 << 62) - 1


def current(device: torch.device) -> AbstractContextManager[object]:
    """``device`` is the thread's current one, which is where Triton starts its kernels."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass
class _Chain:
    grid: Grid
    lattice: Lattice
    link: Link
    state: Tensor | None = None
    """The lattice of the last tensor; None where nothing is held."""

    step: float = 0.0

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
        with current(tokens.device):
            return self._coded(tokens, form, grid)

    def _coded(self, tokens: Tensor, form: Form, grid: Grid) -> Encoded:
        told = Told(grid.channels, form.elements, tokens.device)
        chain = self._continued(tokens, grid, told) or self._begun(tokens, grid, told)
        # Whatever fails from here leaves a state that the decoder does not have.
        self._chain = None
        symbols = chain.lattice.quantise(tokens, chain.state, told)
        if chain.state is None and self._temporal:
            told.size.copy_(chain.lattice.compare(tokens, symbols, _EVERY)[0].mean())
        told.fetch()
        coding = self._opened(tokens.device).compress(symbols.view(torch.uint8).view(-1))
        facts = told.read()
        # While the coded symbols are on their way, the rest is packed.
        coding.fetch()
        exact = outliers_of(self._listed(facts, chain, tokens, symbols), form.dtype.itemsize)
        sides = flags = b""
        if chain.link.key:
            chain.step, chain.size, sides = facts.step, facts.size, pack_channels(facts.ranks, facts.means)
        else:
            flags = np.packbits(facts.predicted).tobytes()
        header = form.header() | {"step": chain.step, "outliers": len(exact.positions), "sum": facts.total}
        header |= chain.link.header()
        chain.link = chain.link.next
        packed = exact.to_bytes()
        frame = coding.read()
        if self._temporal:
            # Only now, when the coder needs none of its memory any more.
            del coding
            chain.state = symbols.to(torch.int16) if chain.state is None else chain.state
            self._chain = chain
        return Encoded(header, (sides, flags, frame, packed), frame)

    def reset(self) -> None:
        self._chain = None

    def _continued(self, tokens: Tensor, grid: Grid, told: Told) -> _Chain | None:
        """The chain that ``tokens`` continue, if they do; then ``told`` has what is predicted."""
        chain = self._chain
        if not chain or chain.state is None or chain.grid != grid or chain.state.device != tokens.device:
            return None
        own, change = chain.lattice.compare(tokens, chain.state, _EVERY)
        if not chain.size / _DRIFT <= float(own.mean()) <= chain.size * _DRIFT:
            return None
        torch.lt(change, own, out=told.predicted)
        return chain

    def _begun(self, tokens: Tensor, grid: Grid, told: Told) -> _Chain:
        measure(tokens, self._relative_step, told)
        return _Chain(grid, Lattice.of(told.ranks, told.means, told.step), Link.first())

    def _listed(self, facts: Facts, chain: _Chain, tokens: Tensor, symbols: Tensor) -> NDArray[np.int64]:
        if facts.listed is not None:
            return facts.listed
        return chain.lattice.outside(tokens, symbols if chain.state is None else chain.state).cpu().numpy()

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
        with current(place):
            values = self._decoded(header, form, coder, place, (sides, flags, frame), total)
        return write_outliers(values.view(form.shape), outliers).to(device)

    def _decoded(
        self, header: Mapping[str, Any], form: Form, coder: ByteCoder, place: torch.device,
        buffers: tuple[memoryview, memoryview, memoryview], total: int,
    ) -> Tensor:  # fmt: skip
        sides, flags, frame = buffers
        coded = coder.load(frame)
        chain, predicted = self._prepared(header, Grid.of(form), sides, flags, place)
        data = coder.expand(coded, form.elements)
        if int(fold(data)) != total:
            raise CodecCorrupt("The symbols of a payload are damaged: their sum does not match.")
        symbols = data.view(torch.int8).view(chain.grid.channels, chain.grid.tokens)
        if chain.state is None:
            chain.state = chain.lattice.empty(chain.grid.tokens)
        values = chain.lattice.restore(symbols, chain.state, predicted, form.dtype.torch)
        chain.link = chain.link.next
        self._chain = chain
        return values

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
            lattice = Lattice.of(ranks, means, torch.full((1,), step, device=place))
            nothing = torch.zeros(grid.channels, dtype=torch.bool, device=place)
            return _Chain(grid, lattice, link, step=step), nothing
        flat_bytes(sides, 0, "channels")
        chosen = np.unpackbits(np.frombuffer(flat_bytes(flags, -(-grid.channels // 8), "prediction"), np.uint8))
        held = self._chain
        if not held or held.link != link:
            raise CodecStateLost("A payload was predicted from a tensor that this decoder does not have.")
        if held.grid != grid or held.step != step:
            raise CodecCorrupt("A payload was predicted from a tensor of another shape.")
        return held, torch.from_numpy(chosen[: grid.channels].view(np.bool_)).to(place)
