"""The contract of a byte coder that works where the symbols are, on the device. Must not know symbols or tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from mesh_codec.errors import CodecCorrupt

LARGEST_SUM = (1 << 62) - 1
"""That a header may announce, see `check`."""


class PendingBytes(ABC):
    """Bytes that are being coded on a device."""

    @abstractmethod
    def fetch(self) -> None:
        """Start bringing them to the host; what was begun has to be read.

        Raises:
            CodecUnsupported: the coder failed.
        """

    @abstractmethod
    def read(self) -> memoryview:
        """The coded bytes; waits for them.

        Raises:
            CodecUnsupported: the coder failed.
        """


class ByteCoder(ABC):
    """An order-0 entropy coder for uint8 tensors; one for each end of a stream, not shared between threads."""

    @abstractmethod
    def compress(self, data: Tensor) -> PendingBytes:
        """Start coding flat contiguous uint8 ``data`` of at least one byte on the coder's device.

        Raises:
            CodecUnsupported: the coder failed.
        """

    @abstractmethod
    def expand(self, frame: memoryview, size: int) -> tuple[Tensor, Tensor]:
        """Start the inverse of `compress`: uint8 [``size``] on the coder's device, and what tells whether it is right,
        int32 [2 + parts]: its `mesh_codec.ans.checksum.checksum`, 8 bytes, and 0 for each part that could be decoded.
        Nothing larger is ever allocated. Whoever waits for either may let go of ``frame``.

        Raises:
            CodecCorrupt: of another size, or seen to be damaged before anything was decoded.
        """


def check(checks: Tensor, total: int) -> None:
    """``checks`` are those of `ByteCoder.expand`, ``total`` is the sum that the bytes had; waits for the device.

    Raises:
        CodecCorrupt: the bytes are others.
    """
    found = checks.cpu()
    if int(found[:2].view(torch.int64)) != total or found[2:].any():
        raise CodecCorrupt("The symbols of a payload are damaged: their sum does not match.")


class CoderFactory(ABC):
    """Makes byte coders of one bitstream."""

    format: ClassVar[str]
    """Ends that name the same format read each other's bytes; a part of the names of the bitstreams made of them."""

    engine: ClassVar[str]
    """What people know the coder by."""

    @abstractmethod
    def available(self) -> bool:
        """Whether coders work on this machine: found out by coding something, once."""

    def problem(self) -> str:
        """Why coders do not work though the hardware is there; empty otherwise."""
        return ""

    @abstractmethod
    def device(self) -> torch.device:
        """Where tensors that this end decodes are, and those that it encodes are moved to."""

    @abstractmethod
    def open(self, device: torch.device) -> ByteCoder:
        """A coder on ``device``.

        Raises:
            CodecUnsupported: there is none.
        """
