"""Small tensors of a device, fetched together: each copy by itself would wait for the device.

Must not know what they are for.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Fetch:
    """A copy of some tensors of one device on its way to the host."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])
        self._there: torch.cuda.Event | None = None
        self._bytes = flat
        if flat.is_cuda:
            self._bytes = torch.empty(flat.shape, dtype=torch.uint8, pin_memory=True)
            self._bytes.copy_(flat, non_blocking=True)
            self._there = torch.cuda.current_stream(flat.device).record_event()

    def read(self) -> list[Tensor]:
        """The tensors, flat, on the CPU; waits until they are there."""
        if self._there is not None:
            self._there.synchronize()
        parts = torch.split(self._bytes, [tensor.nbytes for tensor in self._tensors])
        # Copied, since a part may begin where its type cannot.
        return [part.clone().view(tensor.dtype) for part, tensor in zip(parts, self._tensors, strict=True)]
