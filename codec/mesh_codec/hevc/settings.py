"""The settings of the ``hevc`` codec: checked once, where a stream opens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mesh_codec.errors import CodecUnsupported
from mesh_codec.hevc.engine import RateControl
from mesh_codec.qualities import QualityLevel

MOST_STRIPS = 8

_LARGEST = {"qp": 51, "tile": 64, "strips": MOST_STRIPS}


@dataclass(frozen=True)
class HevcSettings:
    """As in the docstring of `mesh_codec.hevc.codec`."""

    qp: int = 18
    lossless: bool = False
    bits: int = 8
    tile: int = 0
    strips: int = 2
    temporal: bool = True

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> HevcSettings:
        """Raises:
        CodecUnsupported: a setting that does not exist or is out of range.
        """
        values: dict[str, Any] = DEFAULTS | dict(settings)
        whole = all(type(values[key]) is int and 0 <= values[key] <= most for key, most in _LARGEST.items())
        flags = all(type(values[key]) is bool for key in ("lossless", "temporal"))
        if (
            set(values) != set(DEFAULTS)
            or not whole
            or not flags
            or values["bits"] not in (8, 10)
            or not values["strips"]
        ):
            raise CodecUnsupported(
                f"The hevc codec cannot use the settings {str(dict(settings))[:120]}.",
                hint="qp 0 to 51, bits 8 or 10, tile 0 to 64, strips 1 to 8, lossless and temporal true or false",
            )
        return cls(**values)

    @property
    def rate_control(self) -> RateControl:
        """What an engine is told of these settings."""
        return RateControl(self.qp, self.lossless)


DEFAULTS: dict[str, Any] = asdict(HevcSettings())

_BEST_QP, _BEST_PSNR = 1, 40.0
"""QP at which the least PSNR stays over so many dB at the latest cuts, where an error shows most: see
``benchmarks/video_settings.py``."""

_PSNR_OF_8_BITS = 30.0
"""Up to which rounding to 8-bit pixels does not show."""


def settings_for(level: QualityLevel) -> dict[str, Any]:
    """Those of a lossy ``level`` that are not the defaults.

    A QP more makes the quantiser step 2**(1/6) times as large, which costs a decibel.

    Raises:
        CodecUnsupported: it promises more than the finest QP keeps.
    """
    assert level.psnr is not None
    qp = min(round(_BEST_QP + _BEST_PSNR - level.psnr), _LARGEST["qp"])
    if qp < 0:
        raise CodecUnsupported(f"The video codec does not keep {level.psnr:g} dB.", hint="another codec")
    return {"qp": qp, "bits": 8 if level.psnr <= _PSNR_OF_8_BITS else 10}
