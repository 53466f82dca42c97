"""The common way to send activations through a video encoder, as a codec to compare with; not registered anywhere.

Each channel's minimum and maximum become 0 and 255, channels lie in mosaics of ``tile`` x ``tile`` on the planes of
4:4:4 frames, and every tensor is a stream of its own: an IDR picture, then pictures predicted from the one before.
This is what the public torch-nvenc-compress does on NVENC (per-channel uint8, tile 8, QP 18 by default); here libx265
codes the frames, by the same engine as the ``hevc`` codec.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mesh_codec.base import Codec, DecodeLimits, Decoder, Encoded, Encoder, Quality
from mesh_codec.errors import CodecUnsupported
from mesh_codec.hevc.engine import FrameDecoder, FrameEncoder, RateControl
from mesh_codec.hevc.geometry import Geometry
from mesh_codec.hevc.pyav import PyAvEngine
from mesh_codec.payload import form_of, read_form
from mesh_codec.quantiser import Grid

QPS = (10, 18, 22, 28)
"""That the rows of a table have."""

_CPU = torch.device("cpu")


class MinMaxCodec(Codec):
    """HevcSettings: ``qp``, and ``tile``, 8 unless given. For finite tensors of at least one element."""

    name: ClassVar[str] = "minmax"

    def capabilities(self) -> dict[str, Any]:
        return {}

    def settings(self, quality: Quality, peer: Mapping[str, Any]) -> dict[str, Any]:
        raise CodecUnsupported("The minmax codec is there to be compared with.", hint="the hevc codec")

    def encoder(self, settings: Mapping[str, Any]) -> Encoder:
        return _Encoder(int(settings["qp"]), int(settings.get("tile", 8)))

    def decoder(self, settings: Mapping[str, Any], limits: DecodeLimits = DecodeLimits()) -> Decoder:  # noqa: B008
        return _Decoder(int(settings.get("tile", 8)), limits)


class _Encoder(Encoder):
    def __init__(self, qp: int, tile: int) -> None:
        self._coding, self._tile = RateControl(qp, lossless=False), tile
        self._session: tuple[Geometry, FrameEncoder] | None = None

    def encode(self, tensor: Tensor) -> Encoded:
        form = form_of(tensor)
        grid = Grid.of(form)
        channels = tensor.detach().cpu().float().reshape(grid.tokens, grid.channels).t()
        lowest, highest = channels.aminmax(dim=1, keepdim=True)
        scale = (highest - lowest).clamp_min(1e-12) / 255
        pixels = ((channels - lowest) / scale).round_().clamp_(0, 255).to(torch.uint8)
        geometry = Geometry.of(grid, bits=8, tile=self._tile)
        if not self._session or self._session[0] != geometry:
            self._session = geometry, PyAvEngine().encoder(geometry, self._coding, _CPU)
        units = self._session[1].encode(geometry.pack(pixels)[0], key=True)
        sides = torch.cat([scale, lowest], dim=1).numpy().tobytes()
        sizes = np.array([len(unit) for unit in units], dtype="<u4").tobytes()
        return Encoded(form.header(), (sizes, sides, *units))


class _Decoder(Decoder):
    def __init__(self, tile: int, limits: DecodeLimits) -> None:
        self._tile, self._limits = tile, limits
        self._session: tuple[Geometry, FrameDecoder] | None = None

    def decode(self, encoded: Encoded, device: torch.device | str = "cpu") -> Tensor:
        form = read_form(encoded.header, self._limits)
        geometry = Geometry.of(Grid.of(form), bits=8, tile=self._tile)
        _, sides, *units = encoded.buffers
        if not self._session or self._session[0] != geometry:
            self._session = geometry, PyAvEngine().decoder(geometry, _CPU)
        pixels = geometry.unpack(self._session[1].decode([memoryview(unit) for unit in units])[None])
        side = torch.frombuffer(bytearray(sides), dtype=torch.float32).view(-1, 2)
        values: Tensor = pixels.float() * side[:, :1] + side[:, 1:]
        return values.t().to(form.dtype.torch).reshape(form.shape).to(device)
