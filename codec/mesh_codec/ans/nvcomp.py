"""rANS on NVIDIA GPUs through nvCOMP's C interface; extra ``cuda``. Chunks are coded side by side.

All work is put on the caller's current stream and nothing waits but `PendingBytes.read`. The coded chunks go straight
into page-locked memory of the host, written by a kernel: how many bytes they are, only the device knows by then.
"""

from __future__ import annotations

import logging
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesh_codec.ans.chunks import CHUNK, frame_size, pack, padded, plain_chunks, read_table, table_size
from mesh_codec.ans.coder import ByteCoder, CoderFactory, PendingBytes
from mesh_codec.ans.dispatch import checksum
from mesh_codec.ans.libnvcomp import SLACK, Batch, NvCompLibrary
from mesh_codec.errors import CodecError, CodecUnsupported
from mesh_codec.foreign import named
from mesh_codec.memory import tensor_over

_log = logging.getLogger(__name__)


class NvComp(CoderFactory):
    """Coders on the CUDA devices of this machine, if nvCOMP and Triton work there."""

    format: ClassVar[str] = "ans-2"
    engine: ClassVar[str] = "nvcomp"

    def available(self) -> bool:
        return _nvidia() and not self._found

    def problem(self) -> str:
        return self._found if _nvidia() else ""

    def device(self) -> torch.device:
        # Each thread has a current device of its own, the first one unless told otherwise; the models may be elsewhere.
        count = torch.cuda.device_count()
        used = next((index for index in range(count) if torch.cuda.memory_allocated(index)), None)
        return torch.device("cuda", torch.cuda.current_device() if used is None else used)

    def open(self, device: torch.device) -> ByteCoder:
        if device.type != "cuda":
            raise CodecUnsupported(f"nvCOMP codes on CUDA devices, not on {device}.")
        return ChunkCoder(device, self._library)

    @cached_property
    def _library(self) -> NvCompLibrary:
        return NvCompLibrary()

    @cached_property
    def _found(self) -> str:
        """Why coders do not work, found out by coding something; empty if they do."""
        try:
            self._try()
        except CodecError as error:
            _log.info("no entropy coder on the GPU: %s", error)
            return error.message
        return ""

    def _try(self) -> None:
        device = self.device()
        # Triton may be missing, or the compiler that it starts kernels with.
        with torch.cuda.device(device), named(CodecUnsupported, "Triton's kernels do not run here"):
            data = torch.arange(3 * CHUNK // 2, device=device).remainder_(7).to(torch.uint8)
            # Twice: from the second time on a kernel is started in another way (`mesh_codec.ans.launch`).
            seen, expected = {int(checksum(data)) for _ in range(2)}, {int(checksum(data.cpu()))}
        if seen != expected:
            raise CodecUnsupported("Triton's kernels sum up to something else than plain torch.")
        coder = self.open(device)
        with torch.cuda.device(device):
            back, checks = coder.expand(coder.compress(data).read(), len(data))
            if checks[2:].any() or not torch.equal(back, data):
                raise CodecUnsupported("nvCOMP gives back other bytes than it was given.")


class ChunkCoder(ByteCoder):
    """Codes chunks side by side. ``library`` gets addresses of ``device``'s memory; where it codes on the CPU, so does
    this."""

    def __init__(self, device: torch.device, library: NvCompLibrary) -> None:
        self._device, self._library, self._cuda = device, library, device.type == "cuda"
        self._room = padded(library.room(CHUNK))
        self._arrays, self._known = torch.empty(0), (0, 0, 0)
        self._scratch_sizes: dict[tuple[int, bool], int] = {}

    def compress(self, data: Tensor) -> PendingBytes:
        (places, sizes), stream = plain_chunks(len(data)), self._stream()
        count = len(sizes)
        # Zeros: the library leaves gaps between its parts, and what was in this memory before must not be sent.
        rooms = torch.zeros(count * self._room, dtype=torch.uint8, device=self._device)
        # Freed memory is mostly allocated again at the same place: then these addresses are on the device already.
        known = rooms.data_ptr(), data.data_ptr(), len(data)
        if self._known != known:
            coded = rooms.data_ptr() + places // CHUNK * self._room
            self._arrays, self._known = self._to_device(coded, sizes, data.data_ptr() + places, sizes), known
        coded_sizes, statuses = self._arrays[count : 2 * count], _checks(self._arrays, count)[2:]
        self._library.compress(self._batch(self._arrays, count, self._scratch(count, stream, coding=True)), stream)
        return _PendingChunks(rooms, coded_sizes, statuses)

    def expand(self, frame: memoryview, size: int) -> tuple[Tensor, Tensor]:
        coded_places, coded_sizes = read_table(frame, size, self._room)
        coded = torch.empty(frame.nbytes + SLACK, dtype=torch.uint8, device=self._device)
        coded[: frame.nbytes].copy_(tensor_over(frame, torch.uint8), non_blocking=True)
        data = torch.empty(size, dtype=torch.uint8, device=self._device)
        (places, sizes), stream = plain_chunks(size), self._stream()
        count = len(sizes)
        self._library.check(frame, coded_places, coded_sizes, sizes)
        arrays = self._to_device(coded.data_ptr() + coded_places, coded_sizes, data.data_ptr() + places, sizes)
        self._library.decompress(self._batch(arrays, count, self._scratch(count, stream, coding=False)), stream)
        checksum(data, arrays[5 * count : 5 * count + 1])
        return data, _checks(arrays, count)

    def _to_device(self, *columns: NDArray[np.int64]) -> Tensor:
        """int64 on the device: for each chunk the coded address and size, the plain ones, and the size made; what
        `_checks` sees."""
        count = len(columns[0])
        host = torch.empty(5 * count + 1 + -(-count // 2), dtype=torch.int64, pin_memory=self._cuda)
        array = host.numpy()
        array[: 4 * count].reshape(4, count)[:] = columns
        # A status of -1, left where the library writes nothing, counts as a failure.
        array[4 * count :], array[5 * count] = -1, 0
        return host.to(self._device, non_blocking=True)

    def _batch(self, arrays: Tensor, count: int, scratch: Tensor) -> Batch:
        first = arrays.data_ptr()
        coded, coded_sizes, plain, plain_sizes, done, total = range(first, first + 48 * count, 8 * count)
        return Batch(
            coded, coded_sizes, plain, plain_sizes, total + 8, count, CHUNK, done, scratch.data_ptr(), len(scratch)
        )

    def _scratch(self, count: int, stream: int, *, coding: bool) -> Tensor:
        size = self._scratch_sizes.get((count, coding))
        if size is None:
            size = self._library.scratch(count, CHUNK, stream, coding=coding)
            self._scratch_sizes[count, coding] = size
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream if self._cuda else 0


def _nvidia() -> bool:
    # PyTorch calls AMD's devices CUDA devices too.
    return torch.version.cuda is not None and torch.cuda.is_available()


def _checks(arrays: Tensor, count: int) -> Tensor:
    """int32 [2 + chunks]: a sum of 8 bytes, 0 at first, and the statuses."""
    return arrays[5 * count :].view(torch.int32)[: 2 + count]


class _PendingChunks(PendingBytes):
    def __init__(self, rooms: Tensor, sizes: Tensor, statuses: Tensor) -> None:
        self._rooms, self._sizes, self._statuses = rooms, sizes, statuses
        self._frame: Tensor | None = None
        self._there: torch.cuda.Event | None = None

    def fetch(self) -> None:
        count, cuda = len(self._sizes), self._rooms.is_cuda
        self._frame = torch.empty(table_size(count) + len(self._rooms), dtype=torch.uint8, pin_memory=cuda)
        with named(CodecUnsupported, "coded symbols do not reach the host"):
            pack(self._rooms, self._sizes, self._statuses, self._frame)
        if cuda:
            self._there = torch.cuda.current_stream(self._rooms.device).record_event()
        # Only its memory is needed from here on, in the order of the stream.
        del self._rooms

    def read(self) -> memoryview:
        if self._frame is None:
            self.fetch()
        assert self._frame is not None
        if self._there is not None:
            self._there.synchronize()
        frame = self._frame.numpy()
        sizes = frame[: 4 * len(self._sizes)].view("<u4").astype(np.int64)
        if not sizes.all():
            raise CodecUnsupported("nvCOMP could not code a chunk of symbols.")
        return frame[: frame_size(sizes)].data

    def __del__(self) -> None:
        # The kernel writes into memory that nobody but us knows to be in use.
        if self._there is not None:
            self._there.synchronize()
