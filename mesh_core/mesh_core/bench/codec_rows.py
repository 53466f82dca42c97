"""The rows of ``mesh bench codec``: codecs and settings, in the order of the table. One line adds one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mesh_codec import Codec, EntropyCodec, LosslessCodec, RawCodec
from mesh_core.bench.minmax_codec import QPS, MinMaxCodec


@dataclass(frozen=True)
class Row:
    """Attributes:
    family: rows of one family are joined by a line in the plot.
    codec: makes it; may raise ImportError where it needs a package that is not installed.
    """

    family: str
    codec: Callable[[], Codec]
    settings: Mapping[str, Any]

    @property
    def label(self) -> str:
        listed = ", ".join(f"{k} {v}" for k, v in self.settings.items() if not isinstance(v, bool))
        return f"{self.family} {listed}".strip()


_STEPS = (0.06, 0.12, 0.22, 0.4)

ROWS: tuple[Row, ...] = (
    Row("raw", RawCodec, {}),
    Row("lossless", LosslessCodec, {}),
    *(Row("entropy, each tensor alone", EntropyCodec, {"step": s, "temporal": False}) for s in _STEPS),
    *(Row("entropy, predicted", EntropyCodec, {"step": s, "temporal": True}) for s in _STEPS),
    *(Row("per-channel min/max + HEVC", MinMaxCodec, {"qp": qp}) for qp in QPS),
)
