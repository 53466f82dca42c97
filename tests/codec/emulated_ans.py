"""A byte coder like nvCOMP's ANS, on the CPU: zstandard in its place, everything around it as on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from mesh_codec.ans.coder import ByteCoder, CoderFactory
from mesh_codec.symbols import expand, squeeze


class EmulatedAns(CoderFactory):
    format = "step-ans-emulated"
    engine = "emulated"

    def __init__(self, *, works: bool = True) -> None:
        self.works, self.failing = works, False

    def available(self) -> bool:
        return self.works

    def device(self) -> torch.device:
        return torch.device("cpu")

    def open(self, device: torch.device) -> ByteCoder:
        return _Coder(self)


class _Coder(ByteCoder):
    def __init__(self, factory: EmulatedAns) -> None:
        self._factory = factory

    def compress(self, data: Tensor) -> memoryview:
        assert data.dtype == torch.uint8 and data.ndim == 1 and data.is_contiguous()
        if self._factory.failing:
            from mesh_codec import CodecUnsupported

            raise CodecUnsupported("out of memory")
        return memoryview(squeeze(data.numpy()))

    def expand(self, frame: memoryview, size: int) -> Tensor:
        return torch.from_numpy(expand(frame, size, "symbols").copy())
