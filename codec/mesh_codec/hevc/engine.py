"""The contract of a video engine: what turns the frames of one strip into HEVC access units, or back.

All engines make and take the same bitstream, so any may decode what any other encoded. An engine that is not there
says so when it is asked to probe, once. Must not know tensors of a model, headers or settings for a quality.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mesh_codec.hevc.geometry import Geometry


@dataclass(frozen=True)
class RateControl:
    """How an encoder chooses how many bits a picture gets.

    Attributes:
        qp: HEVC's quantisation parameter, 0 to 51; the quantiser step doubles every 6. Of 8-bit pixels: engines coding
            10 bits keep the same error relative to the range.
        lossless: pixels come back as they were; ``qp`` is not used.
    """

    qp: int
    lossless: bool


class FrameEncoder(ABC):
    """An open encoding session for one strip."""

    @abstractmethod
    def encode(self, frames: Tensor, *, key: bool) -> list[bytes]:
        """``frames`` [frames, 3, height, width] of the geometry's pixel type -> one access unit for each.

        With ``key`` the first is an IDR picture with its parameter sets; all else is predicted from what came before.
        An engine may make the first one an IDR picture unasked. No frame is held back for a later call.

        Raises:
            CodecUnsupported: the engine failed. The session is then of no further use.
        """

    def close(self) -> None:  # noqa: B027
        """Let go of the session."""


class FrameDecoder(ABC):
    """An open decoding session for one strip."""

    @abstractmethod
    def decode(self, units: Sequence[memoryview]) -> Tensor:
        """Access units that `bitstream.check_unit` has let through -> [frames, 3, height, width], on any device.

        Raises:
            CodecCorrupt: a unit is damaged: no picture, or one that had to be concealed. The session is then of no
                further use.
        """

    def close(self) -> None:  # noqa: B027
        """Let go of the session."""


class Engine(ABC):
    """A way to code and decode frames on this machine."""

    encodes_with: ClassVar[str]
    decodes_with: ClassVar[str]

    @abstractmethod
    def probe(self) -> tuple[bool, bool]:
        """Whether it can encode, and decode, here. Found out by doing it, once; the reason for a no is logged."""

    def engines(self) -> int:
        """How many strips it works on side by side without them slowing each other down; 0 if that is not known."""
        return 0

    @abstractmethod
    def encoder(self, geometry: Geometry, control: RateControl, device: torch.device) -> FrameEncoder:
        """A session that codes frames of ``geometry`` from ``device``.

        Raises:
            CodecUnsupported: no session can be opened.
        """

    @abstractmethod
    def decoder(self, geometry: Geometry, device: torch.device) -> FrameDecoder:
        """A session that decodes frames of ``geometry``, on ``device`` where it can.

        Raises:
            CodecUnsupported: no session can be opened.
        """
