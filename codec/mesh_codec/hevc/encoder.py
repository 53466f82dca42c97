"""The encoding end of a stream: tensors to pixels, frames and access units."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mesh_codec.base import Encoded, Encoder
from mesh_codec.chains import ChainPosition
from mesh_codec.channels import pack_channels
from mesh_codec.errors import CodecError, CodecUnsupported
from mesh_codec.exact import outliers_at
from mesh_codec.hevc.bitstream import check_unit, is_key
from mesh_codec.hevc.engine import FrameEncoder
from mesh_codec.hevc.engines import Engines
from mesh_codec.hevc.geometry import Geometry
from mesh_codec.hevc.pixels import Calibration
from mesh_codec.hevc.settings import HevcSettings
from mesh_codec.lossy import check_lossy_form
from mesh_codec.payload import crc_of, form_of
from mesh_codec.quantiser import Grid

_MOST_OUTLIERS = 1 / 64
"""Share of the elements above which prediction is given up for a fresh calibration."""


@dataclass
class _EncodingChain:
    """Open sessions and what their next frames may be predicted from."""

    geometry: Geometry
    calibration: Calibration
    sessions: list[FrameEncoder]
    position: ChainPosition = field(default_factory=ChainPosition.first)


class HevcEncoder(Encoder):
    """Engine sessions stay open while tensors keep their shape; strips are coded side by side in ``pool``."""

    def __init__(self, settings: HevcSettings, engines: Engines, pool: ThreadPoolExecutor) -> None:
        self._settings, self._engines, self._pool = settings, engines, pool
        self._chain: _EncodingChain | None = None
        self._fresh = True

    def encode(self, tensor: Tensor) -> Encoded:
        form = form_of(tensor)
        check_lossy_form(form, "hevc")
        if not form.elements:
            return Encoded(form.header() | {"step": 0.0, "outliers": 0, "crc": 0}, ())
        grid = Grid.of(form)
        flat = tensor.detach().reshape(grid.tokens, grid.channels)
        chain, pixels, outside = self._quantised(flat.t(), grid)
        key = chain.position.key
        frames = chain.geometry.pack(pixels)
        try:
            units = self._coded(chain, frames, key=key)
        except CodecError:
            self.close()
            raise
        exact = outliers_at(flat.reshape(-1), outside.t().reshape(-1).nonzero().view(-1))
        table = np.array([len(unit) for unit in units], dtype="<u4").tobytes()
        buffers = (
            table,
            pack_channels(chain.calibration.ranks, chain.calibration.means) if key else b"",
            b"".join(units),
            exact.to_bytes(),
        )
        header = form.header() | {
            "step": chain.calibration.step,
            "outliers": len(exact.positions),
            "crc": crc_of(buffers),
        }
        header |= chain.position.header()
        chain.position = chain.position.next
        return Encoded(header, buffers)

    def reset(self) -> None:
        self._fresh = True

    def close(self) -> None:
        """Let go of the sessions; the next tensor opens new ones."""
        if self._chain:
            for session in self._chain.sessions:
                session.close()
        self._chain = None

    def _quantised(self, channels: Tensor, grid: Grid) -> tuple[_EncodingChain, Tensor, Tensor]:
        """The chain that these ``channels`` [channels, tokens] belong to, new if need be; pixels; those outside."""
        settings = self._settings
        geometry = Geometry.of(grid, bits=settings.bits, tile=settings.tile, strips=settings.strips)
        measured = Calibration.measured(channels, settings.bits)
        chain = self._chain
        going_on = chain and settings.temporal and not self._fresh and chain.geometry == geometry
        if chain and going_on and chain.calibration.fits(measured):
            pixels, outside = chain.calibration.to_pixels(channels)
            if int(outside.sum()) <= _MOST_OUTLIERS * outside.numel():
                return chain, pixels, outside
        chain = self._opened(geometry, measured, channels.device)
        return chain, *measured.to_pixels(channels)

    def _opened(self, geometry: Geometry, calibration: Calibration, device: torch.device) -> _EncodingChain:
        """A new chain, in the open sessions if they are of its geometry: their next frame is an IDR picture."""
        if self._chain and self._chain.geometry == geometry:
            sessions = self._chain.sessions
        else:
            self.close()
            sessions = self._engines.encoders(geometry, self._settings.rate_control, device)
        self._chain, self._fresh = _EncodingChain(geometry, calibration, sessions), False
        return self._chain

    def _coded(self, chain: _EncodingChain, frames: Tensor, *, key: bool) -> list[bytes]:
        """The access units of all strips, each looked at as the decoder will."""
        strips = self._pool.map(lambda pair: pair[0].encode(pair[1], key=key), zip(chain.sessions, frames, strict=True))
        units: list[bytes] = []
        for strip in strips:
            for place, unit in enumerate(strip):
                check_unit(memoryview(unit), chain.geometry, key=place == 0 and (key or is_key(unit)))
            if len(strip) != chain.geometry.frames:
                raise CodecUnsupported(f"An HEVC engine made {len(strip)} packets of {chain.geometry.frames} frames.")
            units += strip
        return units
