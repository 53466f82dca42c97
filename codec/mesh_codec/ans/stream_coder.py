"""The byte coder of one end of a stream, and where it works. Must not know what is coded."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mesh_codec.ans.coder import ByteCoder, CoderFactory
from mesh_codec.errors import CodecUnsupported


class StreamCoder:
    """Opens a byte coder with the first tensor; an encoder opens another one for a tensor on another device."""

    def __init__(self, factory: CoderFactory) -> None:
        self._factory = factory
        self._coder: tuple[torch.device, ByteCoder] | None = None

    def for_encoding(self, tensor: Tensor) -> tuple[Tensor, ByteCoder]:
        """A coder, and ``tensor`` on its device: where the tensor is if coders work there, else where they do.

        Raises:
            CodecUnsupported: no coder can be opened.
        """
        try:
            return tensor, self._at(tensor.device)
        except CodecUnsupported:
            tensor = tensor.to(self._factory.device())
            return tensor, self._at(tensor.device)

    def for_decoding(self, wanted: torch.device | str) -> tuple[torch.device, ByteCoder]:
        """The device to decode on, and a coder there: what the first call ``wanted`` if coders work on that, else where
        they do; the same for all later calls.

        Raises:
            CodecUnsupported: no coder can be opened.
        """
        if not self._coder:
            place = torch.empty(0, device=wanted).device
            self._at(place if place.type == self._factory.device().type else self._factory.device())
        assert self._coder
        return self._coder

    def _at(self, device: torch.device) -> ByteCoder:
        if not self._coder or self._coder[0] != device:
            self._coder = device, self._factory.open(device)
        return self._coder[1]


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """``device`` is the thread's current one, which is where Triton starts its kernels."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
