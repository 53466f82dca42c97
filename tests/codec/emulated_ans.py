"""A byte coder like nvCOMP's ANS, on the CPU: zstandard in its place, everything around it as on a GPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mesh_codec.ans.coder import ByteCoder, CoderFactory, Coding
from mesh_codec.symbols import expand, squeeze


class EmulatedAns(CoderFactory):
    format = "step-ans-emulated"
    engine = "emulated"

    def __init__(self, *, works: bool = True) -> None:
        self.works, self.failing = works, False

    def available(self) -> bool:
        return self.works

    def problem(self) -> str:
        return "" if self.works else "no kernels"

    def device(self) -> torch.device:
        return torch.device("cpu")

    def open(self, device: torch.device) -> ByteCoder:
        return _Coder(self)


class _Coder(ByteCoder):
    def __init__(self, factory: EmulatedAns) -> None:
        self._factory = factory

    def compress(self, data: Tensor) -> Coding:
        assert data.dtype == torch.uint8 and data.ndim == 1 and data.is_contiguous()
        if self._factory.failing:
            from mesh_codec import CodecUnsupported

            raise CodecUnsupported("out of memory")
        return _Coding(squeeze(data.numpy()))

    def load(self, frame: memoryview) -> Tensor:
        return torch.from_numpy(np.frombuffer(frame, np.uint8).copy())

    def expand(self, coded: Tensor, size: int) -> Tensor:
        return torch.from_numpy(expand(coded.numpy().data, size, "symbols").copy())


class _Coding(Coding):
    def __init__(self, coded: bytes) -> None:
        self._coded = coded

    def fetch(self) -> None:
        pass

    def read(self) -> memoryview:
        return memoryview(self._coded)
