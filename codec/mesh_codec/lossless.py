"""The exact codec that compresses: planes of bytes, each entropy coded by zstandard. Any element type, any shape.

A float's sign is moved behind its mantissa, so that the first plane of a bfloat16 or float32 is its whole exponent:
that is where the bits are saved. Mantissas are noise.

Buffers: 0 the table (per piece and plane: coded size as uint32, little endian), 1 the frames, piece after piece, the
plane of the highest bytes first. Header: ``dtype`` and ``shape``. An empty tensor has no buffers.

Must not know models, links or channels. Stateless.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesh_codec.base import Codec, Decoder, Encoded, Encoder, Limits, Quality
from mesh_codec.dtypes import DType
from mesh_codec.errors import CodecCorrupt, CodecUnsupported
from mesh_codec.parallel import new_pool
from mesh_codec.payload import bytes_of, flat_bytes, form_of, read_form
from mesh_codec.symbols import check_frame, expand, squeeze

FORMAT = "planes-zstd-1"

_PIECE = 1 << 18
"""Elements."""

_WORDS: Mapping[int, str] = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8"}


class LosslessCodec(Codec):
    """Exact, whatever the quality. No settings, no state."""

    name: ClassVar[str] = "lossless"

    def capabilities(self) -> dict[str, Any]:
        return {"formats": [FORMAT]}

    def settings(self, quality: Quality, peer: Mapping[str, Any]) -> dict[str, Any]:
        formats = peer.get("formats")
        if not isinstance(formats, list | tuple) or FORMAT not in formats:
            raise CodecUnsupported(
                f"The other end's lossless codec has the formats {str(formats)[:80]}, this end has {FORMAT}.",
                hint="the same version of comfyui-mesh-codec at both ends",
            )
        return {}

    def encoder(self, settings: Mapping[str, Any]) -> LosslessEncoder:
        _no_settings(settings)
        return LosslessEncoder(self._pool)

    def decoder(self, settings: Mapping[str, Any], limits: Limits = Limits()) -> LosslessDecoder:  # noqa: B008
        _no_settings(settings)
        return LosslessDecoder(limits, self._pool)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return new_pool("lossless")


class LosslessEncoder(Encoder):
    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool

    def encode(self, tensor: Tensor) -> Encoded:
        form = form_of(tensor)
        if not form.elements:
            return Encoded(form.header(), ())
        host = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        words = np.frombuffer(bytes_of(host), dtype=_WORDS[form.dtype.itemsize])
        starts = range(0, form.elements, _PIECE)
        frames = [
            frame
            for piece in self._pool.map(lambda start: _code(words[start : start + _PIECE], form.dtype), starts)
            for frame in piece
        ]
        table = np.array([len(frame) for frame in frames], dtype="<u4").tobytes()
        return Encoded(form.header(), (table, b"".join(frames)))


class LosslessDecoder(Decoder):
    def __init__(self, limits: Limits, pool: ThreadPoolExecutor) -> None:
        self._limits, self._pool = limits, pool

    def decode(self, encoded: Encoded, device: torch.device | str = "cpu") -> Tensor:
        form = read_form(encoded.header, self._limits)
        expected = 2 if form.elements else 0
        if len(encoded.buffers) != expected:
            raise CodecCorrupt(f"A lossless tensor came in {len(encoded.buffers)} buffers where {expected} belong.")
        if not expected:
            return torch.empty(form.shape, dtype=form.dtype.torch, device=device)
        planes, starts = form.dtype.itemsize, range(0, form.elements, _PIECE)
        # The size of the table bounds the work for a payload that announces much and holds little.
        table = flat_bytes(encoded.buffers[0], 4 * planes * len(starts), "table")
        frames = flat_bytes(encoded.buffers[1], None, "planes")
        ends = list(accumulate(np.frombuffer(table, dtype="<u4").tolist()))
        if ends[-1] != frames.nbytes:
            raise CodecCorrupt(f"The planes of a payload have {frames.nbytes} bytes where {ends[-1]} belong.")
        parts = [frames[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        for i, part in enumerate(parts):
            check_frame(part, min(_PIECE, form.elements - starts[i // planes]), "planes")
        result = torch.empty(form.shape, dtype=form.dtype.torch)
        words = np.frombuffer(bytes_of(result), dtype=_WORDS[planes])

        def restore(i: int) -> None:
            piece = words[starts[i] : starts[i] + _PIECE]
            _restore(parts[i * planes : (i + 1) * planes], piece, form.dtype)

        # The list makes the first failure of a piece surface here.
        list(self._pool.map(restore, range(len(starts))))
        return result.to(device)


def _code(words: NDArray[np.unsignedinteger], dtype: DType) -> list[bytes]:
    if dtype.lossy:
        words = np.bitwise_or(words << 1, words >> (8 * dtype.itemsize - 1), dtype=words.dtype)
    return [squeeze((words >> 8 * place).astype(np.uint8)) for place in reversed(range(dtype.itemsize))]


def _restore(frames: list[memoryview], words: NDArray[np.unsignedinteger], dtype: DType) -> None:
    """Write what ``frames`` hold to ``words``."""
    columns = words.view(np.uint8).reshape(-1, dtype.itemsize)
    for place, frame in enumerate(reversed(frames)):
        columns[:, place] = expand(frame, len(words), "planes")
    if dtype.torch is torch.bool and columns.max() > 1:
        raise CodecCorrupt("A lossless bool tensor holds bytes that are neither 0 nor 1.")
    if dtype.lossy:
        np.bitwise_or(words >> 1, words << (8 * dtype.itemsize - 1), out=words)


def _no_settings(settings: Mapping[str, Any]) -> None:
    if settings:
        raise CodecUnsupported(f"The lossless codec has no settings, got {', '.join(map(str, settings))}.")
