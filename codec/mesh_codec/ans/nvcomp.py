"""rANS on NVIDIA GPUs through nvCOMP's Python package, 6.0; extra ``cuda``.

`Codec(algorithm="ANS")` codes chunks side by side, each with a table of its own; a codec is bound to one stream and
one thread; `decode` into a buffer of ours never writes past its end and refuses what is larger. Seen on an H100: a
codec that was opened with other options than the encoder's gives back other bytes without a word, so that the options
are part of the format; and memory that the library takes from the driver's pool goes back to the system whenever a
stream is waited for, which costs milliseconds, so that it takes it from torch's allocator here.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from mesh_codec.ans.coder import ByteCoder, CoderFactory, Coding
from mesh_codec.ans.lattice import fold
from mesh_codec.errors import CodecCorrupt, CodecError, CodecUnsupported
from mesh_codec.foreign import named
from mesh_codec.payload import tensor_over

_log = logging.getLogger(__name__)

_OPTIONS = {"algorithm": "ANS", "data_type": "|u1", "uncomp_chunk_size": 1 << 17, "states_per_lane": 1}
"""Of the format. Chunks of 128 KiB with one state cost 4 % fewer bits than the library's own choice, in like time."""


class NvComp(CoderFactory):
    format: ClassVar[str] = "step-ans-1"
    engine: ClassVar[str] = "nvcomp"

    def available(self) -> bool:
        return torch.cuda.is_available() and not self._found

    def problem(self) -> str:
        return self._found if torch.cuda.is_available() else ""

    def device(self) -> torch.device:
        # Each thread has a current device of its own, the first one unless told otherwise; the models may be elsewhere.
        count = torch.cuda.device_count()
        used = next((index for index in range(count) if torch.cuda.memory_allocated(index)), None)
        return torch.device("cuda", torch.cuda.current_device() if used is None else used)

    def open(self, device: torch.device) -> ByteCoder:
        if device.type != "cuda":
            raise CodecUnsupported(f"nvCOMP codes on CUDA devices, not on {device}.")
        return _Coder(device)

    @cached_property
    def _found(self) -> str:
        """What coding something brought to light; empty if all is well."""
        try:
            self._try()
        except CodecError as error:
            _log.info("no entropy coder on the GPU: %s", error)
            return error.message
        return ""

    def _try(self) -> None:
        device = self.device()
        coder = self.open(device)
        data = torch.arange(1 << 18, device=device).remainder_(7).to(torch.uint8)
        if not torch.equal(coder.expand(coder.load(coder.compress(data).read()), len(data)), data):
            raise CodecUnsupported("nvCOMP gives back other bytes than it was given.")
        # Triton may be missing, or the compiler that it starts kernels with.
        with torch.cuda.device(device), named(CodecUnsupported, "Triton's kernels do not run here"):
            seen = int(fold(data))
        if seen != int(fold(data.cpu())):
            raise CodecUnsupported("Triton's kernels sum up to something else than plain torch.")


class _Coder(ByteCoder):
    def __init__(self, device: torch.device) -> None:
        self._device = device
        with named(
            CodecUnsupported,
            "nvCOMP cannot be used; try pip install nvidia-nvcomp-cu13 (or -cu12 with drivers before 580)",
        ):
            from nvidia import nvcomp

            self._nvcomp: Any = nvcomp
        # Work of ours and of the library runs in this order, whatever stream the caller's thread has.
        self._stream = torch.cuda.current_stream(device)
        with torch.cuda.device(device), named(CodecUnsupported, "nvCOMP has no ANS coder"):
            self._nvcomp.set_device_allocator(_Block)
            self._codec = self._nvcomp.Codec(
                device_id=device.index or 0, cuda_stream=self._stream.cuda_stream, **_OPTIONS
            )

    def compress(self, data: Tensor) -> Coding:
        with self._in_order(), named(CodecUnsupported, "nvCOMP cannot encode"):
            array = self._codec.encode(self._nvcomp.as_array(data, self._stream.cuda_stream))
        return _Coding(array, data, self._stream)

    def load(self, frame: memoryview) -> Tensor:
        with self._in_order():
            return tensor_over(frame, torch.uint8).to(self._device, non_blocking=True)

    def expand(self, coded: Tensor, size: int) -> Tensor:
        with self._in_order(), named(CodecCorrupt, "nvCOMP cannot decode the symbols of a payload"):
            data = torch.empty(size, dtype=torch.uint8, device=self._device)
            # Memory of ours, whose size is fixed: the library refuses what is larger. What is smaller the sum over the
            # symbols shows.
            self._codec.decode(self._nvcomp.as_array(coded, self._stream.cuda_stream), out=data)
            # The library's work ends with a call into Python; who goes on without waiting holds it up by milliseconds.
            self._stream.synchronize()
        return data

    def _in_order(self) -> AbstractContextManager[object]:
        """The coder's device and stream, after what the caller's does."""
        current = torch.cuda.current_stream(self._device)
        if current == self._stream:
            return torch.cuda.device(self._device)
        self._stream.wait_stream(current)
        return torch.cuda.stream(self._stream)


class _Coding(Coding):
    def __init__(self, array: Any, data: Tensor, stream: torch.cuda.Stream) -> None:
        # The data is read until all is coded.
        self._array, self._data, self._stream = array, data, stream
        self._host: Tensor | None = None

    def fetch(self) -> None:
        with torch.cuda.stream(self._stream), named(CodecUnsupported, "nvCOMP cannot encode"):
            # Not through DLPack: there 6.0 gives the size that it had reserved, not that of what it made.
            coded = torch.as_tensor(self._array, device=self._data.device)
            self._host = torch.empty(coded.numel(), dtype=torch.uint8, pin_memory=True)
            self._host.copy_(coded.view(torch.uint8).view(-1), non_blocking=True)

    def read(self) -> memoryview:
        if self._host is None:
            self.fetch()
        assert self._host is not None
        self._stream.synchronize()
        return self._host.numpy().data


class _Block:
    """Device memory for nvCOMP, of torch's allocator: on the current device and stream, which are the codec's."""

    def __init__(self, nbytes: int, stream: Any) -> None:
        self._memory = torch.empty(nbytes, dtype=torch.uint8, device="cuda")

    @property
    def ptr(self) -> int:
        return self._memory.data_ptr()
