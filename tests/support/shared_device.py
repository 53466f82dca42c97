"""A GPU that is none: memory of the processor that processes export and open by numbers, as a GPU's driver does it.

Its memory is a file without a name; a handle says whose. What the driver of a GPU refuses, it refuses too.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct

import torch

from mesh_codec.errors import CodecUnsupported
from mesh_core.crossing.device_driver import HANDLE_BYTES, DeviceDriver

_NAMED = struct.Struct("<QQQ")


class EmulatedDevice(DeviceDriver):
    """For tensors on the CPU.

    Attributes:
        allocated: bytes by address, of what is not given back.
        opened: addresses that are open.
        copies: how many there were.
        most: bytes that there are.
    """

    kind = "cpu"
    engine = "emulated-1"

    def __init__(self, most: int = 1 << 30) -> None:
        self.most, self.copies = most, 0
        self.allocated: dict[int, int] = {}
        self.opened: set[int] = set()
        self._memory: dict[int, tuple[mmap.mmap, int]] = {}

    def available(self) -> bool:
        return True

    def place(self, device: torch.device) -> str:
        return "emulated"

    def allocate(self, device: torch.device, nbytes: int) -> int:
        if sum(self.allocated.values()) + nbytes > self.most:
            raise CodecUnsupported("The emulated device has no memory left.")
        number = os.memfd_create("emulated-device")
        os.ftruncate(number, nbytes)
        address = self._mapped(number, nbytes)
        self.allocated[address] = nbytes
        return address

    def free(self, device: torch.device, address: int) -> None:
        del self.allocated[address]
        os.close(self._memory.pop(address)[1])

    def export(self, device: torch.device, address: int) -> bytes:
        said = _NAMED.pack(os.getpid(), self._memory[address][1], self.allocated[address])
        return said.ljust(HANDLE_BYTES, b"\0")

    def open(self, device: torch.device, handle: bytes, place: str) -> tuple[torch.device, int, int]:
        maker, number, nbytes = _NAMED.unpack(handle[: _NAMED.size])
        try:
            opened = os.open(f"/proc/{maker}/fd/{number}", os.O_RDWR)
        except OSError as error:
            raise CodecUnsupported(f"The emulated device does not know the handle: {error}.") from error
        address = self._mapped(opened, nbytes)
        self.opened.add(address)
        return device, address, nbytes

    def close(self, device: torch.device, address: int) -> None:
        self.opened.remove(address)
        os.close(self._memory.pop(address)[1])

    def copy(self, device: torch.device, target: int, source: int, nbytes: int) -> None:
        ctypes.memmove(target, source, nbytes)
        self.copies += 1

    def _mapped(self, number: int, nbytes: int) -> int:
        memory = mmap.mmap(number, nbytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._memory[address] = memory, number
        return address
