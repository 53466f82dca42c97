"""The coder of NVIDIA GPUs on the CPU: zstandard in nvCOMP's place, everything around it as on a GPU."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from numpy.typing import NDArray

from mesh_codec import CodecError, CodecUnsupported
from mesh_codec.ans.coder import ByteCoder, CoderFactory
from mesh_codec.ans.libnvcomp import Batch
from mesh_codec.ans.nvcomp import ChunkCoder
from mesh_codec.symbols import expand, squeeze

CANNOT_DECOMPRESS, CANNOT_COMPRESS = 12, 19


class EmulatedAns(CoderFactory):
    format = "ans-emulated"
    engine = "emulated"

    def __init__(self, *, works: bool = True) -> None:
        self.works, self.failing = works, ""

    def available(self) -> bool:
        return self.works

    def problem(self) -> str:
        return "" if self.works else "no kernels"

    def device(self) -> torch.device:
        return torch.device("cpu")

    def open(self, device: torch.device) -> ByteCoder:
        return ChunkCoder(device, _EmulatedLibrary(self))


class _EmulatedLibrary:
    """Stands in for `mesh_codec.ans.libnvcomp.NvCompLibrary`; ``factory.failing``: "call" or "chunk"."""

    def __init__(self, factory: EmulatedAns) -> None:
        self._factory = factory

    def room(self, largest: int) -> int:
        return largest + 100

    def scratch(self, count: int, largest: int, stream: int, *, coding: bool) -> int:
        return 0

    def compress(self, batch: Batch, stream: int) -> None:
        if self._factory.failing == "call":
            raise CodecUnsupported("out of memory")
        chunks = zip(_array(batch.plain, batch).tolist(), _array(batch.plain_sizes, batch).tolist(), strict=True)
        for number, (plain, size) in enumerate(chunks):
            coded = squeeze(np.frombuffer(ctypes.string_at(plain, size), np.uint8))
            assert len(coded) <= self.room(batch.largest)
            ctypes.memmove(int(_array(batch.coded, batch)[number]), coded, len(coded))
            _array(batch.coded_sizes, batch)[number] = len(coded)
            failed = self._factory.failing == "chunk" and number == batch.count - 1
            _statuses(batch)[number] = CANNOT_COMPRESS if failed else 0

    def check(self, *frame: object) -> None:
        pass

    def decompress(self, batch: Batch, stream: int) -> None:
        chunks = list(zip(_array(batch.coded, batch).tolist(), _array(batch.coded_sizes, batch).tolist(), strict=True))
        for number, (coded, size) in enumerate(chunks):
            assert (coded - chunks[0][0]) % 16 == 0
            room = int(_array(batch.plain_sizes, batch)[number])
            try:
                plain = expand(memoryview(ctypes.string_at(coded, size)), room, "symbols").tobytes()
            except CodecError:
                _statuses(batch)[number] = CANNOT_DECOMPRESS
                continue
            ctypes.memmove(int(_array(batch.plain, batch)[number]), plain, len(plain))
            _array(batch.done_sizes, batch)[number] = len(plain)
            _statuses(batch)[number] = 0


def _array(address: int, batch: Batch) -> NDArray[np.int64]:
    return np.frombuffer((ctypes.c_int64 * batch.count).from_address(address), np.int64)


def _statuses(batch: Batch) -> NDArray[np.int32]:
    return np.frombuffer((ctypes.c_int32 * batch.count).from_address(batch.statuses), np.int32)
