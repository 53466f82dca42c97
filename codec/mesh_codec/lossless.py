"""The exact codec that compresses: planes of bytes, each entropy coded by zstandard. Any element type, any shape.

A float's sign is moved behind its mantissa, so that the first plane of a bfloat16 or float32 is its whole exponent:
that is where the bits are saved. Mantissas are noise.

Buffers: 0 the table (per piece and plane: coded size as uint32, little endian), 1 the frames, piece after piece, the
plane of the highest bytes first. Header: ``dtype`` and ``shape``. An empty tensor has no buffers.

Where both ends have a coder on their GPUs, bfloat16 and float16 are coded there, in the bitstream of
`mesh_codec.ans.planes`.

Must not know models, links or channels. Stateless.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesh_codec.ans.coder import CoderFactory
from mesh_codec.ans.nvcomp import NvComp
from mesh_codec.ans.planes import PlanesDecoder, PlanesEncoder
from mesh_codec.base import Codec, DecodeLimits, Decoder, Encoded, Encoder, Estimate, Quality
from mesh_codec.dtypes import DType
from mesh_codec.errors import CodecCorrupt, CodecError, CodecUnsupported
from mesh_codec.foreign import named
from mesh_codec.formats import shared_format
from mesh_codec.memory import bytes_of
from mesh_codec.parallel import new_pool
from mesh_codec.payload import buffers_of, flat_bytes, form_of, read_form
from mesh_codec.qualities import find
from mesh_codec.symbols import check_frame, expand, squeeze

_log = logging.getLogger(__name__)

FORMAT = "planes-zstd-1"

_PIECE = 1 << 18
"""Elements."""

_WORDS: Mapping[int, str] = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8"}


class LosslessCodec(Codec):
    """Exact, whatever the quality; no state. Setting: ``format``, the bitstream, the portable one unless given.
    ``on_device`` makes coders of the other one; nvCOMP's, unless given."""

    name: ClassVar[str] = "lossless"

    def __init__(self, on_device: CoderFactory | None = None) -> None:
        self._on_device = on_device or NvComp()

    def capabilities(self) -> dict[str, Any]:
        """The formats, the fastest first."""
        return {"formats": [*([self._device_format] if self._works_on_device else []), FORMAT]}

    def settings(self, quality: Quality, peer: Mapping[str, Any]) -> dict[str, Any]:
        find(quality)
        chosen = shared_format(self.name, self.capabilities()["formats"], peer)
        return {} if chosen == FORMAT else {"format": chosen}

    def estimate(self, settings: Mapping[str, Any], dtype: torch.dtype) -> Estimate:
        return Estimate(engine=self._on_device.engine if settings else "")

    def encoder(self, settings: Mapping[str, Any]) -> Encoder:
        portable = LosslessEncoder(self._pool)
        return PlanesEncoder(self._on_device, portable) if self._device_chosen(settings) else portable

    def decoder(self, settings: Mapping[str, Any], limits: DecodeLimits = DecodeLimits()) -> Decoder:  # noqa: B008
        portable = LosslessDecoder(limits, self._pool)
        return PlanesDecoder(limits, self._on_device, portable) if self._device_chosen(settings) else portable

    @property
    def _device_format(self) -> str:
        return f"planes-{self._on_device.format}"

    @cached_property
    def _works_on_device(self) -> bool:
        """Found out once, with all bits that a number can have."""
        if not self._on_device.available():
            return False
        every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16, device=self._on_device.device())
        portable = LosslessEncoder(self._pool), LosslessDecoder(DecodeLimits(), self._pool)
        try:
            with named(CodecUnsupported, "a trial failed"):
                coded = PlanesEncoder(self._on_device, portable[0]).encode(every.view(torch.bfloat16))
                back = PlanesDecoder(DecodeLimits(), self._on_device, portable[1]).decode(coded, every.device)
        except CodecError as error:
            _log.warning("the lossless codec works on the processor, not on this GPU: %s", error)
            return False
        return torch.equal(back.view(torch.int16), every)

    def _device_chosen(self, settings: Mapping[str, Any]) -> bool:
        chosen: Any = settings.get("format", FORMAT)
        if set(settings) - {"format"} or chosen not in (FORMAT, self._device_format):
            raise CodecUnsupported(
                f"The lossless codec cannot use the settings {str(dict(settings))[:80]}.",
                hint="nothing, or a format",
            )
        if chosen != FORMAT and not self._works_on_device:
            raise CodecUnsupported(f"This end cannot code {chosen}.", hint="pip install comfyui-mesh-codec[cuda]")
        return bool(chosen != FORMAT)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return new_pool("lossless")


class LosslessEncoder(Encoder):
    """The portable bitstream; pieces are coded side by side in ``pool``."""

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
    """The other end of `LosslessEncoder`."""

    def __init__(self, limits: DecodeLimits, pool: ThreadPoolExecutor) -> None:
        self._limits, self._pool = limits, pool

    def decode(self, encoded: Encoded, device: torch.device | str = "cpu") -> Tensor:
        form = read_form(encoded.header, self._limits)
        buffers = buffers_of(encoded, form, 2)
        if not buffers:
            return form.empty(device)
        planes, starts = form.dtype.itemsize, range(0, form.elements, _PIECE)
        # The size of the table bounds the work for a payload that announces much and holds little.
        table = flat_bytes(buffers[0], 4 * planes * len(starts), "table")
        frames = buffers[1]
        ends = list(accumulate(np.frombuffer(table, dtype="<u4").tolist()))
        if ends[-1] != frames.nbytes:
            raise CodecCorrupt(f"The planes of a payload have {frames.nbytes} bytes where {ends[-1]} belong.")
        parts = [frames[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        for i, part in enumerate(parts):
            check_frame(part, min(_PIECE, form.elements - starts[i // planes]), "planes")
        result = form.empty()
        words = np.frombuffer(bytes_of(result), dtype=_WORDS[planes])

        def restore(i: int) -> None:
            piece = words[starts[i] : starts[i] + _PIECE]
            _restore(parts[i * planes : (i + 1) * planes], piece, form.dtype)

        # Only reading all results raises the first error of a piece here.
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
