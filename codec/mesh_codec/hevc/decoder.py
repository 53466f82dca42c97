"""The decoding end of a stream. All that a payload announces is checked before anything is allocated or decoded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from mesh_codec.base import DecodeLimits, Decoder, Encoded
from mesh_codec.chains import ChainPosition
from mesh_codec.channels import read_channels
from mesh_codec.errors import CodecCorrupt, CodecError, CodecStateLost
from mesh_codec.exact import write_outliers
from mesh_codec.hevc.bitstream import check_unit, is_key
from mesh_codec.hevc.engine import FrameDecoder
from mesh_codec.hevc.engines import Engines
from mesh_codec.hevc.geometry import Geometry
from mesh_codec.hevc.pixels import Calibration
from mesh_codec.hevc.settings import HevcSettings
from mesh_codec.lossy import read_lossy_form
from mesh_codec.outliers import read_outliers
from mesh_codec.payload import buffers_of, crc_of, flat_bytes, positive_number, whole_number
from mesh_codec.quantiser import Grid


@dataclass
class _DecodingChain:
    """The chain whose pictures the open sessions hold, and the place of the next tensor in it."""

    geometry: Geometry
    sessions: list[FrameDecoder]
    calibration: Calibration
    position: ChainPosition


class HevcDecoder(Decoder):
    """The other end of `HevcEncoder`; engine sessions stay open while tensors keep their shape."""

    def __init__(
        self, settings: HevcSettings, limits: DecodeLimits, engines: Engines, pool: ThreadPoolExecutor
    ) -> None:
        self._settings, self._limits, self._engines, self._pool = settings, limits, engines, pool
        self._chain: _DecodingChain | None = None

    def decode(self, encoded: Encoded, device: torch.device | str = "cpu") -> Tensor:
        device = torch.device(device)
        header, form = encoded.header, read_lossy_form(encoded.header, self._limits, "hevc")
        buffers = buffers_of(encoded, form, 4)
        if not buffers:
            return form.empty(device)
        if whole_number(header, "crc", (1 << 32) - 1) != crc_of(buffers):
            raise CodecCorrupt("A payload was damaged: its checksum does not match.")
        position, step = ChainPosition.read(header), positive_number(header, "step")
        table, sides, packets, exact = buffers
        grid = Grid.of(form)
        geometry = self._geometry(grid)
        units = _split(geometry, table, packets, key=position.key)
        outliers = read_outliers(
            exact, whole_number(header, "outliers", form.elements), form.dtype.itemsize, form.elements
        )
        if position.key:
            ranks, means = read_channels(sides, grid.channels)
            chain = self._begun(position, geometry, Calibration(means, ranks, step, geometry.bits), device)
        else:
            flat_bytes(sides, 0, "channels")
            chain = self._continued(position, geometry, step)
        planes = self._decoded(chain, units)
        values = chain.calibration.to_values(geometry.unpack(planes).to(device), form.dtype.torch)
        return write_outliers(values.t().contiguous().view(form.shape), outliers)

    def reset(self) -> None:
        if self._chain:
            for session in self._chain.sessions:
                session.close()
        self._chain = None

    def _geometry(self, grid: Grid) -> Geometry:
        settings = self._settings
        return Geometry.of(grid, bits=settings.bits, tile=settings.tile, strips=settings.strips)

    def _continued(self, position: ChainPosition, geometry: Geometry, step: float) -> _DecodingChain:
        chain = self._chain
        if not chain or chain.position != position:
            raise CodecStateLost("A payload was predicted from a tensor that this decoder does not have.")
        if chain.geometry != geometry or chain.calibration.step != step:
            raise CodecCorrupt("A payload was predicted from a tensor of another shape.")
        return chain

    def _begun(
        self, position: ChainPosition, geometry: Geometry, calibration: Calibration, device: torch.device
    ) -> _DecodingChain:
        """A new chain, in the open sessions if they are of its geometry."""
        if self._chain and self._chain.geometry == geometry:
            sessions = self._chain.sessions
        else:
            self.reset()
            sessions = self._engines.decoders(geometry, device)
        self._chain = _DecodingChain(geometry, sessions, calibration, position)
        return self._chain

    def _decoded(self, chain: _DecodingChain, units: list[list[memoryview]]) -> Tensor:
        """[strips, frames, 3, height, width]. What a failure leaves in the sessions is forgotten with them."""
        try:
            strips = list(self._pool.map(lambda pair: pair[0].decode(pair[1]), zip(chain.sessions, units, strict=True)))
        except CodecError:
            self.reset()
            raise
        chain.position = chain.position.next
        return torch.stack(strips) if len(strips) > 1 else strips[0][None]


def _split(geometry: Geometry, table: memoryview, packets: memoryview, *, key: bool) -> list[list[memoryview]]:
    """The access units by strip and frame, each one checked."""
    count = geometry.strips * geometry.frames
    flat_bytes(table, 4 * count, "table")
    ends = list(accumulate(np.frombuffer(table, dtype="<u4").tolist()))
    if ends[-1] != packets.nbytes:
        raise CodecCorrupt(f"The video packets of a payload have {packets.nbytes} bytes where {ends[-1]} belong.")
    units = [packets[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    for place, unit in enumerate(units):
        first = place % geometry.frames == 0
        check_unit(unit, geometry, key=first and (key or is_key(bytes(unit))))
    return [units[start : start + geometry.frames] for start in range(0, count, geometry.frames)]
