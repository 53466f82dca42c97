"""The settings of the ``hevc`` codec: checked once, where a stream opens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from mesh_codec.base import Quality
from mesh_codec.errors import CodecUnsupported
from mesh_codec.hevc.engine import RateControl

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
    def coding(self) -> RateControl:
        return RateControl(self.qp, self.lossless)


DEFAULTS: dict[str, Any] = asdict(HevcSettings())

QUALITIES: Mapping[Quality, Mapping[str, Any]] = MappingProxyType(
    {
        "transparent": {"qp": 1, "bits": 10},
        "balanced": {"qp": 6, "bits": 10},
        "fast": {"qp": 11},
    }
)
"""For the latest cuts, where an error shows most: see ``benchmarks/video_settings.py``."""
