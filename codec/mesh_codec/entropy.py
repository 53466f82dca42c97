"""The lossy codec: one common quantiser step for all channels, round to nearest, entropy coding.

A tensor [..., channels] is seen as [channels, tokens]; each channel's mean is taken off, the channels are sorted by
their deviation and cut into pieces, so that each piece has symbols of like statistics and its own code tables. A
piece holds its symbols, or their change since the tensor before, whichever is cheaper. What no symbol can stand for,
non-finite elements included, crosses exactly as an outlier: nothing is clipped.

Two bitstreams: the portable one of `mesh_codec.entropy_streams`, by zstandard on the CPU, and that of `mesh_codec.ans`,
coded on the GPU, where both ends can. This module names the codec, negotiates which, and checks its settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from math import log2
from typing import Any, ClassVar

import torch

from mesh_codec.ans.coder import CoderFactory
from mesh_codec.ans.nvcomp import NvComp
from mesh_codec.ans.stream import AnsDecoder, AnsEncoder
from mesh_codec.base import Codec, DecodeLimits, Decoder, Encoder, Estimate, Quality, StreamMemory
from mesh_codec.entropy_streams import EntropyDecoder, EntropyEncoder
from mesh_codec.errors import CodecUnsupported
from mesh_codec.formats import shared_format
from mesh_codec.parallel import new_pool
from mesh_codec.qualities import find

FORMAT = "step-zstd-2"

_BITS = 1.9
_BITS_PER_OCTAVE = 0.6
_REFERENCE_STEP = 0.1
"""Bits per element with prediction over 8 steps of tiny-klein, at this step, and what half of it costs more."""

_STEP_LIMITS = (1e-3, 8.0)


class EntropyCodec(Codec):
    """Quantises float16, bfloat16 and float32. Settings: ``step``, relative to the channels' deviation; ``temporal``:
    whether a tensor may be predicted from the one before in its stream; ``format``: the bitstream, the portable one
    unless given. ``on_device`` makes coders of the other bitstream; nvCOMP's, unless given."""

    name: ClassVar[str] = "entropy"

    def __init__(self, on_device: CoderFactory | None = None) -> None:
        self._on_device = on_device or NvComp()

    def capabilities(self) -> dict[str, Any]:
        """The formats, the fastest first."""
        fast = [self._device_format] if self._on_device.available() else []
        return {"formats": [*fast, FORMAT]}

    def settings(self, quality: Quality, peer: Mapping[str, Any]) -> dict[str, Any]:
        level = find(quality)
        if level.exact:
            raise CodecUnsupported(
                f"The entropy codec has no quality {quality!r}.", hint="the raw and lossless codecs are exact"
            )
        chosen = shared_format(self.name, self.capabilities()["formats"], peer)
        settings = {"step": level.step, "temporal": True}
        return settings if chosen == FORMAT else settings | {"format": chosen}

    def estimate(self, settings: Mapping[str, Any], dtype: torch.dtype) -> Estimate:
        engine = self._on_device.engine if settings.get("format", FORMAT) != FORMAT else ""
        if not settings.get("temporal", True):
            return Estimate(engine=engine)
        bits = _BITS - _BITS_PER_OCTAVE * log2(float(settings["step"]) / _REFERENCE_STEP)
        return Estimate(max(bits, 0.5), engine, f"{self.name}+temporal")

    def memory(self, settings: Mapping[str, Any]) -> StreamMemory:
        return "restored" if settings.get("temporal", True) else "none"

    def remedies(self) -> Sequence[tuple[str, str]]:
        problem = self._on_device.problem()
        if not problem:
            return ()
        what = f"codes on the processor, a hundred times slower than this GPU could: {problem}"
        return [(what, "pip install comfyui-mesh-codec[cuda]; Triton comes with PyTorch on Linux, else triton-windows")]

    def encoder(self, settings: Mapping[str, Any]) -> Encoder:
        step, temporal, on_device = self._checked(settings)
        if on_device:
            return AnsEncoder(step, temporal, self._on_device)
        return EntropyEncoder(step, temporal, self._pool)

    def decoder(self, settings: Mapping[str, Any], limits: DecodeLimits = DecodeLimits()) -> Decoder:  # noqa: B008
        _, temporal, on_device = self._checked(settings)
        if on_device:
            return AnsDecoder(limits, self._on_device)
        return EntropyDecoder(temporal, limits, self._pool)

    @property
    def _device_format(self) -> str:
        return f"step-{self._on_device.format}"

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return new_pool("entropy")

    def _checked(self, settings: Mapping[str, Any]) -> tuple[float, bool, bool]:
        """Step, whether to predict, and whether on the device."""
        step: Any = settings.get("step")
        temporal: Any = settings.get("temporal", True)
        chosen: Any = settings.get("format", FORMAT)
        lowest, highest = _STEP_LIMITS
        known = set(settings) <= {"step", "temporal", "format"} and type(temporal) is bool
        known = known and chosen in (FORMAT, self._device_format)
        if not known or type(step) not in (int, float) or not lowest <= step <= highest:
            raise CodecUnsupported(
                f"The entropy codec cannot use the settings {str(dict(settings))[:80]}.",
                hint=f"{{'step': x, 'temporal': True}} with x from {lowest} to {highest}",
            )
        if chosen != FORMAT and not self._on_device.available():
            raise CodecUnsupported(f"This end cannot code {chosen}.", hint="pip install comfyui-mesh-codec[cuda]")
        return float(step), temporal, chosen != FORMAT
