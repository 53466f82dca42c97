"""The portable lossy codec: one common quantiser step for all channels, round to nearest, entropy coding by zstandard.

A tensor [..., channels] is seen as [channels, tokens]; each channel's mean is taken off, the channels are sorted by
their deviation and cut into pieces, so that each piece has symbols of like statistics and its own code tables. A
piece holds its symbols, or their change since the tensor before, whichever is cheaper. What no symbol can stand for,
non-finite elements included, crosses exactly as an outlier: nothing is clipped.

This module names the codec and checks its settings; `mesh_codec.entropy_streams` has the bitstream.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

from mesh_codec.base import Codec, Limits, Quality
from mesh_codec.entropy_streams import EntropyDecoder, EntropyEncoder
from mesh_codec.errors import CodecUnsupported
from mesh_codec.parallel import new_pool

FORMAT = "step-zstd-2"

STEPS: Mapping[Quality, float] = MappingProxyType({"transparent": 0.06, "balanced": 0.1, "fast": 0.18})
"""Quantiser step in standard deviations; from the table of ``mesh bench codec``."""

_STEP_LIMITS = (1e-3, 8.0)


class EntropyCodec(Codec):
    """Quantises float16, bfloat16 and float32. Settings: ``step``, relative to the channels' deviation, and
    ``temporal``: whether a tensor may be predicted from the one before in its stream."""

    name: ClassVar[str] = "entropy"

    def capabilities(self) -> dict[str, Any]:
        return {"formats": [FORMAT]}

    def settings(self, quality: Quality, peer: Mapping[str, Any]) -> dict[str, Any]:
        if quality not in STEPS:
            raise CodecUnsupported(
                f"The entropy codec has no quality {quality!r}.", hint="the raw and lossless codecs are exact"
            )
        formats = peer.get("formats")
        if not isinstance(formats, list | tuple) or FORMAT not in formats:
            raise CodecUnsupported(
                f"The other end's entropy codec has the formats {str(formats)[:80]}, this end has {FORMAT}.",
                hint="the same version of comfyui-mesh-codec at both ends",
            )
        return {"step": STEPS[quality], "temporal": True}

    def encoder(self, settings: Mapping[str, Any]) -> EntropyEncoder:
        step, temporal = _checked(settings)
        return EntropyEncoder(step, temporal, self._pool)

    def decoder(self, settings: Mapping[str, Any], limits: Limits = Limits()) -> EntropyDecoder:  # noqa: B008
        _, temporal = _checked(settings)
        return EntropyDecoder(temporal, limits, self._pool)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return new_pool("entropy")


def _checked(settings: Mapping[str, Any]) -> tuple[float, bool]:
    step: Any = settings.get("step")
    temporal: Any = settings.get("temporal", True)
    lowest, highest = _STEP_LIMITS
    known = set(settings) <= {"step", "temporal"} and type(temporal) is bool
    if not known or type(step) not in (int, float) or not lowest <= step <= highest:
        raise CodecUnsupported(
            f"The entropy codec cannot use the settings {str(dict(settings))[:80]}.",
            hint=f"{{'step': x, 'temporal': True}} with x from {lowest} to {highest}",
        )
    return float(step), temporal
