"""torch's CUDA context of a device, for a library that wants its handle and leaves others current. Must not know video.

torch works in the primary context of each device. A library that is given no context makes its own on a thread without
one, and then neither sees the other's memory; one that pops a context too many makes torch's next call fail.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from mesh_codec.errors import CodecUnsupported


class PrimaryContext:
    """Attributes:
    handle: of the context; 0 on a device that is not CUDA, where `current` changes nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.handle = 0
        if device.type != "cuda":
            return
        index = torch.cuda.current_device() if device.index is None else device.index
        number, context = ctypes.c_int(), ctypes.c_void_p()
        _driver_call("cuDeviceGet", ctypes.byref(number), index)
        # Held for the life of the process, as torch holds it.
        _driver_call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
        self.handle = context.value or 0

    @contextmanager
    def current(self) -> Iterator[None]:
        """It is the thread's current context inside, and what was current before is so again after."""
        if not self.handle:
            yield
            return
        before = ctypes.c_void_p()
        _driver_call("cuCtxGetCurrent", ctypes.byref(before))
        _driver_call("cuCtxSetCurrent", ctypes.c_void_p(self.handle))
        try:
            yield
        finally:
            _driver_call("cuCtxSetCurrent", before if before.value else ctypes.c_void_p(self.handle))


@lru_cache(maxsize=64)
def context_of(device: torch.device) -> PrimaryContext:
    """That of ``device``, retained once per process.

    Raises:
        CodecUnsupported: the driver is missing or refuses.
    """
    return PrimaryContext(device)


@lru_cache(maxsize=1)
def _driver() -> Any:
    # torch is imported: the process has loaded it already.
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def _driver_call(name: str, *arguments: Any) -> None:
    try:
        status = getattr(_driver(), name)(*arguments)
    except OSError as error:
        raise CodecUnsupported(f"The CUDA driver cannot be loaded: {error}.") from error
    if status:
        raise CodecUnsupported(f"{name} of the CUDA driver failed with error {status}.")
