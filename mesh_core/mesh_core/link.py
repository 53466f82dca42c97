"""A measured link between two ends, and the built-in choice of a codec for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mesh_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from mesh_codec.base import Codec, CodecChoice, Quality
    from mesh_core.adapter import Role


@dataclass(frozen=True)
class Link:
    """Attributes:
    bandwidth: bytes per second, one way.
    latency: seconds for a small message there and back.
    """

    bandwidth: float
    latency: float


class DefaultCodecChoice:
    """Built-in ``mesh_choose_codec``: hidden state as the quality asks, everything else exact."""

    LOSSY = "entropy"

    @hookimpl(trylast=True)
    def mesh_choose_codec(
        self, role: Role, link: Link | None, quality: Quality, codecs: Sequence[Codec], peer: dict[str, Any]
    ) -> CodecChoice | None:
        from mesh_codec.base import CodecChoice

        usable = {codec.name: codec for codec in codecs if codec.name in peer}
        if role == "hidden" and quality != "lossless" and self.LOSSY in usable:
            settings = usable[self.LOSSY].settings(quality, peer[self.LOSSY])
            return CodecChoice(self.LOSSY, settings, f"quality {quality}: {self.LOSSY}")
        if "raw" in usable:
            reason = f"quality {quality}: raw" if quality == "lossless" else f"{role} crosses exact: raw"
            return CodecChoice("raw", usable["raw"].settings("lossless", peer["raw"]), reason)
        return None
