"""The decoding end of a stream. All that a payload announces is checked before anything is allocated or decoded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mesh_codec.base import Decoder, Encoded, Limits
from mesh_codec.errors import CodecCorrupt, CodecError, CodecStateLost
from mesh_codec.hevc.bitstream import check_unit, is_key
from mesh_codec.hevc.encoder import checksum
from mesh_codec.hevc.engine import FrameDecoder
from mesh_codec.hevc.engines import Engines
from mesh_codec.hevc.geometry import Geometry
from mesh_codec.hevc.pixels import Calibration
from mesh_codec.hevc.settings import Settings
from mesh_codec.outliers import MAX_ELEMENTS, read_outliers
from mesh_codec.payload import Form, flat_bytes, read_form, whole_number
from mesh_codec.quantiser import Grid
from mesh_codec.symbols import expand


@dataclass
class _Chain:
    """The chain whose pictures the open sessions hold, and the index of the next tensor in it."""

    geometry: Geometry
    sessions: list[FrameDecoder]
    calibration: Calibration | None = None
    name: int = -1
    index: int = 0


class HevcDecoder(Decoder):
    def __init__(self, settings: Settings, limits: Limits, engines: Engines, pool: ThreadPoolExecutor) -> None:
        self._settings, self._limits, self._engines, self._pool = settings, limits, engines, pool
        self._chain: _Chain | None = None

    def decode(self, encoded: Encoded, device: torch.device | str = "cpu") -> Tensor:
        device = torch.device(device)
        header, form = encoded.header, read_form(encoded.header, self._limits)
        if not form.dtype.lossy or form.elements > MAX_ELEMENTS:
            raise CodecCorrupt(f"A payload announces {form.elements} elements of {form.dtype.name}: not coded by hevc.")
        expected = 4 if form.elements else 0
        if len(encoded.buffers) != expected:
            raise CodecCorrupt(f"A coded tensor came in {len(encoded.buffers)} buffers where {expected} belong.")
        if not expected:
            return torch.empty(form.shape, dtype=form.dtype.torch, device=device)
        buffers = tuple(flat_bytes(b, None, "payload") for b in encoded.buffers)
        if whole_number(header, "crc", (1 << 32) - 1) != checksum(buffers):
            raise CodecCorrupt("A payload was damaged: its checksum does not match.")
        key = header.get("key")
        if type(key) is not bool:
            raise CodecCorrupt(f"A payload's 'key' is {str(key)[:40]}, not true or false.")
        table, sides, packets, exact = buffers
        grid = Grid.of(form)
        geometry = self._geometry(grid)
        units = _split(geometry, table, packets, key=key)
        outliers = read_outliers(
            exact, whole_number(header, "outliers", form.elements), form.dtype.itemsize, form.elements
        )
        calibration = _read_channels(sides, grid.channels, _step(header), geometry.bits) if key else None
        chain = self._ready(header, geometry, calibration, device)
        planes = self._decoded(chain, units)
        assert chain.calibration is not None
        values = chain.calibration.to_values(geometry.unpack(planes).to(device), form.dtype.torch)
        return _with_outliers(values, form, outliers.positions, outliers.values)

    def reset(self) -> None:
        if self._chain:
            for session in self._chain.sessions:
                session.close()
        self._chain = None

    def _geometry(self, grid: Grid) -> Geometry:
        settings = self._settings
        return Geometry.of(grid, bits=settings.bits, tile=settings.tile, strips=settings.strips)

    def _ready(self, header: Any, geometry: Geometry, calibration: Calibration | None, device: torch.device) -> _Chain:
        """The chain that the payload continues, or a new one."""
        name = whole_number(header, "chain", (1 << 62) - 1)
        index = whole_number(header, "index", (1 << 62) - 1)
        chain = self._chain
        if calibration is None:
            if not chain or chain.calibration is None or (chain.name, chain.index) != (name, index):
                raise CodecStateLost("A payload was predicted from a tensor that this decoder does not have.")
            if chain.geometry != geometry or chain.calibration.step != _step(header):
                raise CodecCorrupt("A payload was predicted from a tensor of another shape.")
            return chain
        if index:
            raise CodecCorrupt(f"A payload's 'index' is {index} in a key tensor.")
        if not chain or chain.geometry != geometry:
            self.reset()
            chain = _Chain(geometry, self._engines.decoders(geometry, device))
        chain.calibration, chain.name, chain.index = calibration, name, 0
        self._chain = chain
        return chain

    def _decoded(self, chain: _Chain, units: list[list[memoryview]]) -> Tensor:
        """[strips, frames, 3, height, width]. What a failure leaves in the sessions is forgotten with them."""
        try:
            strips = list(self._pool.map(lambda pair: pair[0].decode(pair[1]), zip(chain.sessions, units, strict=True)))
        except CodecError:
            self.reset()
            raise
        chain.index += 1
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


def _step(header: Any) -> float:
    step = header.get("step")
    if type(step) is not float or not 0 <= step <= torch.finfo(torch.float32).max:
        raise CodecCorrupt(f"A payload's 'step' is {str(step)[:40]}, not a float32 number from 0.")
    return float(step)


def _read_channels(frame: memoryview, channels: int, step: float, bits: int) -> Calibration:
    data = expand(frame, 3 * channels, "channels").copy()
    means = torch.from_numpy(data[channels:].view("<u2").view(np.int16)).view(torch.bfloat16)
    if not means.isfinite().all():
        raise CodecCorrupt("The channel means of a payload are not finite.")
    return Calibration(means, torch.from_numpy(data[:channels]), step, bits)


def _with_outliers(values: Tensor, form: Form, positions: Any, bits: Any) -> Tensor:
    result = values.t().contiguous()
    if len(positions):
        places = torch.from_numpy(positions).to(result.device)
        kind = {2: torch.int16, 4: torch.int32}[form.dtype.itemsize]
        exact = torch.from_numpy(bits.copy().view(f"<i{form.dtype.itemsize}"))
        result.view(kind).view(-1)[places] = exact.to(kind).to(result.device)
    return result.view(form.shape)
