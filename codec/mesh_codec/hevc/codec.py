"""The ``hevc`` codec: clipped quantisation to 8 or 10 bit pixels, 4:4:4 HEVC, exact outliers.

Settings: ``qp`` (0 to 51), ``lossless`` (pixels come back as they were: the quantisation to pixels is the only error),
``bits`` (8 or 10), ``tile`` (images on a side of a plane's mosaic; 0 for as many as fit), ``strips`` (streams that are
coded side by side), ``temporal`` (later tensors of a stream are predicted from earlier ones).

Buffers: 0 the sizes of the access units (uint32 each, little endian, by strip and frame), 1 the channels (ranks as
uint8 each, means as bfloat16 each, a zstandard frame; empty but in key tensors), 2 the access units one after the
other, 3 the outliers. Header: ``dtype``, ``shape``, ``step``, ``outliers`` (their number), ``chain`` and ``index`` (see
`mesh_codec.chains`), ``crc`` (zlib's CRC-32 of all buffers). An empty tensor has no buffers.

Must not know models, links or which engine is at the other end.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, ClassVar

import torch

from mesh_codec.base import Codec, DecodeLimits, Estimate, Quality, StreamMemory
from mesh_codec.errors import CodecUnsupported
from mesh_codec.hevc.decoder import HevcDecoder
from mesh_codec.hevc.encoder import HevcEncoder
from mesh_codec.hevc.engines import Engines
from mesh_codec.hevc.settings import DEFAULTS, MOST_STRIPS, HevcSettings, settings_for
from mesh_codec.parallel import ForkedPool
from mesh_codec.qualities import find

FORMAT = "hevc-444-1"

_THREADS = 4


class HevcCodec(Codec):
    """Codes float16, bfloat16 and float32. ``engines`` are those of this machine, unless given."""

    name: ClassVar[str] = "hevc"

    def __init__(self, engines: Engines | None = None) -> None:
        self._engines = engines or Engines.installed()

    def capabilities(self) -> dict[str, Any]:
        encodes, decodes = self._engines.names()
        formats = [FORMAT] if encodes and decodes else []
        engines = self._engines.count()
        return {"formats": formats, "encoders": list(encodes), "decoders": list(decodes), "engines": engines}

    def settings(self, quality: Quality, peer: Mapping[str, Any]) -> dict[str, Any]:
        level = find(quality)
        if level.exact:
            raise CodecUnsupported(f"The hevc codec has no quality {quality!r}.", hint="the raw codec is lossless")
        own = self.capabilities()
        for whose, formats in (("This end", own["formats"]), ("The other end", peer.get("formats"))):
            if not isinstance(formats, list | tuple) or FORMAT not in formats:
                raise CodecUnsupported(
                    f"{whose} cannot code {FORMAT}: no HEVC engine, or another version.",
                    hint="pip install comfyui-mesh-codec[hevc] at both ends",
                )
        engines = [count for count in (own["engines"], peer.get("engines")) if type(count) is int]
        strips = min(MOST_STRIPS, max(DEFAULTS["strips"], *engines))
        return {**DEFAULTS, "strips": strips, **settings_for(level)}

    def estimate(self, settings: Mapping[str, Any], dtype: torch.dtype) -> Estimate:
        encodes, decodes = self._engines.names()
        return Estimate(engine=f"{encodes[0]}+{decodes[0]}" if encodes and decodes else "")

    def memory(self, settings: Mapping[str, Any]) -> StreamMemory:
        """What engines predict from is theirs, and cannot be brought back."""
        return "reset" if settings.get("temporal", DEFAULTS["temporal"]) else "none"

    def encoder(self, settings: Mapping[str, Any]) -> HevcEncoder:
        return HevcEncoder(HevcSettings.read(settings), self._engines, self._pool)

    def decoder(self, settings: Mapping[str, Any], limits: DecodeLimits = DecodeLimits()) -> HevcDecoder:  # noqa: B008
        return HevcDecoder(HevcSettings.read(settings), limits, self._engines, self._pool)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ForkedPool(_THREADS, "hevc")
