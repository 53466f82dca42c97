"""The rows of ``mesh bench codec``: codecs and settings, in the order of the table. One line adds one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mesh_codec import Codec, EntropyCodec, LosslessCodec, RawCodec


@dataclass(frozen=True)
class CodecSetting:
    """A codec with one choice of settings.

    Attributes:
        family: what is joined by a line in the plot.
        codec: makes it.
    """

    family: str
    codec: Callable[[], Codec]
    settings: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The family, and the settings that are no mere switches."""
        listed = ", ".join(f"{k} {v}" for k, v in self.settings.items() if not isinstance(v, bool))
        return f"{self.family} {listed}".strip()


_STEPS = (0.06, 0.1, 0.2, 0.36)

SETTINGS: tuple[CodecSetting, ...] = (
    CodecSetting("raw", RawCodec, {}),
    CodecSetting("lossless", LosslessCodec, {}),
    *(CodecSetting("entropy, predicted", EntropyCodec, {"step": s, "temporal": True}) for s in _STEPS),
    *(CodecSetting("entropy, each tensor alone", EntropyCodec, {"step": s, "temporal": False}) for s in _STEPS[1:]),
)
