"""The engines of this machine, and which of them a strip is coded by. Must not know what an engine calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from mesh_codec.errors import CodecUnsupported
from mesh_codec.hevc.engine import Engine, FrameDecoder, FrameEncoder, RateControl
from mesh_codec.hevc.geometry import Geometry


class Engines:
    """Attributes:
    engines: by preference.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = tuple(engines)

    @classmethod
    def installed(cls) -> Engines:
        """Hardware first, where it is there, and software."""
        from mesh_codec.hevc.nvvideo import NvVideoEngine
        from mesh_codec.hevc.pyav import PyAvEngine

        return cls([NvVideoEngine(), PyAvEngine()])

    def count(self) -> int:
        """How many strips are worth having here; 0 if that is not known."""
        return max(engine.engines() for engine in self.engines)

    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Of those that can encode, and decode."""
        encodes = tuple(engine.encodes_with for engine in self.engines if engine.probe()[0])
        decodes = tuple(engine.decodes_with for engine in self.engines if engine.probe()[1])
        return encodes, decodes

    def encoders(self, geometry: Geometry, control: RateControl, device: torch.device) -> list[FrameEncoder]:
        """A session for each strip, of the first engine that opens them all.

        Raises:
            CodecUnsupported: none does.
        """
        able = [engine for engine in self.engines if engine.probe()[0]]
        return _opened(able, lambda engine: engine.encoder(geometry, control, device), geometry.strips)

    def decoders(self, geometry: Geometry, device: torch.device) -> list[FrameDecoder]:
        """As `encoders`."""
        able = [engine for engine in self.engines if engine.probe()[1]]
        return _opened(able, lambda engine: engine.decoder(geometry, device), geometry.strips)


StripSession = TypeVar("StripSession", FrameEncoder, FrameDecoder)


def _opened(engines: Sequence[Engine], open_one: Callable[[Engine], StripSession], count: int) -> list[StripSession]:
    failed: CodecUnsupported | None = None
    for engine in engines:
        sessions: list[StripSession] = []
        try:
            while len(sessions) < count:
                sessions.append(open_one(engine))
            return sessions
        except CodecUnsupported as error:
            # Hardware has a few sessions only, shared with every other program: software goes on where they are out.
            failed = error
            for session in sessions:
                session.close()
    raise CodecUnsupported(
        "No HEVC engine is there to be used.", hint="pip install comfyui-mesh-codec[hevc]"
    ) from failed
