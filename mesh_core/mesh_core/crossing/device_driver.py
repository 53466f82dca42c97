"""What `mesh_core.crossing.device_memory` needs of a GPU's driver, and NVIDIA's driver that does it.

Memory is allocated from the driver itself: what torch's allocators give out cannot always be exported (expandable
segments, cudaMallocAsync), and may be given out again. The driver's own library is on every machine with its driver.
"""

from __future__ import annotations

import ctypes
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from threading import Lock
from typing import Any

import torch

from mesh_codec.errors import CodecUnsupported
from mesh_core.system.logs import logger

log = logger(__name__)

HANDLE_BYTES = 64

_PEERS = 1
"""Flag of cuIpcOpenMemHandle: let this GPU reach the other one's memory by itself."""

_NO_PEERS = 217
"""CUDA_ERROR_PEER_ACCESS_UNSUPPORTED."""


class DeviceDriver(ABC):
    """Memory of a device by its address. Any thread may use it.

    Every method that can fail raises `CodecUnsupported`.

    Attributes:
        kind: of the torch devices that it is for.
        engine: how handles are made, which both ends must have in common.
    """

    kind: str
    engine: str

    @abstractmethod
    def available(self) -> bool:
        """Whether this process can export memory."""

    @abstractmethod
    def place(self, device: torch.device) -> str:
        """The same for a device in all processes of this machine."""

    @abstractmethod
    def allocate(self, device: torch.device, nbytes: int) -> int:
        """The address of new memory."""

    @abstractmethod
    def free(self, device: torch.device, address: int) -> None:
        """Give back what `allocate` gave."""

    @abstractmethod
    def export(self, device: torch.device, address: int) -> bytes:
        """The handle, `HANDLE_BYTES` long, of what `allocate` gave."""

    @abstractmethod
    def open(self, device: torch.device, handle: bytes, place: str) -> tuple[torch.device, int, int]:
        """Memory of another process, which ``device`` is to read and lies at ``place``: the device for `close`, the
        address, and how many bytes there are."""

    @abstractmethod
    def close(self, device: torch.device, address: int) -> None:
        """End what `open` began."""

    @abstractmethod
    def copy(self, device: torch.device, target: int, source: int, nbytes: int) -> None:
        """Copy from address to address, after all that ``device`` was told before; returns when that is done."""


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * HANDLE_BYTES)]


class CudaDriver(DeviceDriver):
    """NVIDIA's, through the C interface of libcuda."""

    kind = "cuda"
    engine = "cuda-ipc-1"

    def __init__(self) -> None:
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self._lock = Lock()
        self._works: bool | None = None

    def available(self) -> bool:
        """Not before torch uses a GPU here: a first use takes hundreds of megabytes of its memory."""
        if self._works is None and sys.platform == "linux" and torch.version.cuda and _torch_uses_one():
            self._works = self._tried()
        return self._works is True

    def _tried(self) -> bool | None:
        """Some virtual machines and containers have a driver that exports nothing. None while no GPU is in use."""
        try:
            number = self._used()
            if number is None:
                return None
            device = torch.device("cuda", number)
            address = self.allocate(device, 1 << 21)
            try:
                self.export(device, address)
            finally:
                self.free(device, address)
        except (CodecUnsupported, OSError, AttributeError) as error:
            log.info("no memory of GPUs is handed over: %s", error)
            return False
        return True

    @cached_property
    def _library(self) -> Any:
        return ctypes.CDLL("libcuda.so.1")

    def place(self, device: torch.device) -> str:
        text = ctypes.create_string_buffer(32)
        self._call("cuDeviceGetPCIBusId", text, 32, self._ordinal(device))
        return text.value.decode()

    def allocate(self, device: torch.device, nbytes: int) -> int:
        address = ctypes.c_uint64()
        wanted = ctypes.byref(address), ctypes.c_size_t(nbytes)
        with self._current(device):
            try:
                self._call("cuMemAlloc_v2", *wanted)
            except CodecUnsupported:
                torch.cuda.empty_cache()  # what torch holds without using it
                self._call("cuMemAlloc_v2", *wanted)
        return address.value

    def free(self, device: torch.device, address: int) -> None:
        with self._current(device):
            self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def export(self, device: torch.device, address: int) -> bytes:
        handle = _Handle()
        with self._current(device):
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return ctypes.string_at(ctypes.byref(handle), HANDLE_BYTES)

    def open(self, device: torch.device, handle: bytes, place: str) -> tuple[torch.device, int, int]:
        try:
            return self._opened(device, handle)
        except _DriverError as error:
            if error.number != _NO_PEERS:
                raise
        # The driver then carries what is copied through the memory of the host.
        return self._opened(self._device_at(place), handle)

    def _opened(self, device: torch.device, handle: bytes) -> tuple[torch.device, int, int]:
        address, size = ctypes.c_uint64(), ctypes.c_size_t()
        with self._current(device):
            given = _Handle.from_buffer_copy(handle)
            self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), given, ctypes.c_uint(_PEERS))
            base = ctypes.c_uint64()
            try:
                self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
            except CodecUnsupported:
                self.close(device, address.value)
                raise
        return device, address.value, base.value + size.value - address.value

    def close(self, device: torch.device, address: int) -> None:
        with self._current(device):
            self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def copy(self, device: torch.device, target: int, source: int, nbytes: int) -> None:
        stream = torch.cuda.current_stream(device)
        with self._current(device):
            places = ctypes.c_uint64(target), ctypes.c_uint64(source)
            self._call("cuMemcpyAsync", *places, ctypes.c_size_t(nbytes), ctypes.c_void_p(stream.cuda_stream))
        stream.synchronize()

    def _device_at(self, place: str) -> torch.device:
        ordinal = ctypes.c_int()
        self._call("cuDeviceGetByPCIBusId", ctypes.byref(ordinal), place.encode())
        return torch.device("cuda", ordinal.value)

    def _used(self) -> int | None:
        """A GPU that this process uses already."""
        flags, active = ctypes.c_uint(), ctypes.c_int()
        for number in range(torch.cuda.device_count()):
            self._call("cuDevicePrimaryCtxGetState", number, ctypes.byref(flags), ctypes.byref(active))
            if active.value:
                return number
        return None

    def _ordinal(self, device: torch.device) -> int:
        return device.index if device.index is not None else torch.cuda.current_device()

    @contextmanager
    def _current(self, device: torch.device) -> Iterator[None]:
        """With the context of ``device`` that torch uses as well, whatever this thread did before."""
        number = self._ordinal(device)
        with self._lock:
            if number not in self._contexts:
                context = ctypes.c_void_p()
                self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
                self._contexts[number] = context
        self._call("cuCtxPushCurrent_v2", self._contexts[number])
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *arguments: object) -> None:
        result: int = getattr(self._library, name)(*arguments)
        if result:
            raise _DriverError(name, result)


class _DriverError(CodecUnsupported):
    def __init__(self, name: str, number: int) -> None:
        super().__init__(f"The GPU's driver refuses {name}: error {number}.", hint="--codec raw")
        self.number = number


def _torch_uses_one() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
