"""Memory of a GPU that one process fills and another one reads: `Exported` and `Imported`.

What goes from one process to the other is numbers: where the GPU's memory is, and where the flags are that both write
(see `mesh_core.transport.shared_memory`). The reader writes into a slot's flag when it has read it. The memory is given
back only when no other process has it open any more, which the system knows even of processes that were killed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from secrets import token_bytes
from time import sleep
from typing import Any

import torch

from mesh_codec.errors import CodecCorrupt, CodecUnsupported
from mesh_codec.payload import whole_number
from mesh_core.crossing.device_driver import HANDLE_BYTES, DeviceDriver
from mesh_core.errors import WireMalformed
from mesh_core.transport.shared_memory import SharedMemory

SLOTS = 2
"""Of one stream: a tensor is read before the next one of its stream is made, unless a message is lost."""

_FLAGS = 4096
_GRAIN = 1 << 21
_LABEL_BYTES = 16
_LOOK_EVERY = 0.1


class Exported:
    """Room for `SLOTS` tensors of ``size`` bytes on ``device``.

    Raises:
        CodecUnsupported: there is no memory, of the device or for the flags.
    """

    def __init__(self, driver: DeviceDriver, device: torch.device, size: int) -> None:
        self.size, self.device = -(-size // _GRAIN) * _GRAIN, device
        self._driver, self._label, self._uses = driver, token_bytes(_LABEL_BYTES), 0
        try:
            self._flags = SharedMemory.make(_FLAGS)
        except OSError as error:
            raise CodecUnsupported(f"This system shares no memory: {error}.", hint="--codec raw") from error
        self._address = driver.allocate(device, SLOTS * self.size)
        weakref.finalize(self, _retire, driver, device, self._address, self._flags).atexit = False
        self._facts = {
            "label": self._label,
            "maker": self._flags.maker,
            "flags": self._flags.number,
            "handle": driver.export(device, self._address),
            "place": driver.place(device),
            "size": self.size,
        }
        _OWN[self._label] = self

    def put(self, source: int, nbytes: int) -> dict[str, Any] | None:
        """Copy from an address; what `Imported` needs to know, or None while all slots wait to be read."""
        slot, use = self._uses % SLOTS, self._uses // SLOTS + 1
        if use > 1 and int(self._flags.flags[0][slot]) != use - 1:
            return None
        self._driver.copy(self.device, self.slot(slot), source, nbytes)
        self._uses += 1
        return {**self._facts, "slot": slot, "use": use}

    def slot(self, number: int) -> int:
        """The address of a slot."""
        return self._address + number * self.size

    def read(self, slot: int, use: int) -> None:
        """It was read in this process."""
        self._flags.flags[0][slot] = use


_OWN: weakref.WeakValueDictionary[bytes, Exported] = weakref.WeakValueDictionary()
"""By label: the process that exports memory cannot open it again."""


class Imported:
    """Memory that another process exports, as it says itself: ``said`` is checked.

    Attributes:
        label: of the memory; another one's is another memory.

    Raises:
        CodecCorrupt: it says what cannot be.
        CodecUnsupported: it cannot be opened here.
    """

    def __init__(self, driver: DeviceDriver, device: torch.device, said: Mapping[str, Any]) -> None:
        handle, place = said.get("handle"), said.get("place")
        maker, number = whole_number(said, "maker", (1 << 31) - 1), whole_number(said, "flags", (1 << 31) - 1)
        if type(handle) is not bytes or len(handle) != HANDLE_BYTES or type(place) is not str or len(place) > 32:
            raise CodecCorrupt("A payload does not say where its memory on the GPU is.")
        self.label, self._driver = label_of(said), driver
        try:
            self._flags = SharedMemory.open(maker, number, _FLAGS)
            self._flags.hold()
        except (OSError, WireMalformed) as error:
            raise CodecUnsupported(f"The memory of process {maker} cannot be opened: {error}.") from error
        if self._flags.flags[1][0]:
            raise CodecUnsupported(f"Process {maker} has given its memory up.")
        owner, self._address, self._room = driver.open(device, handle, place)
        weakref.finalize(self, _let_go, driver, owner, self._address, self._flags).atexit = False

    def copy(self, device: torch.device, target: int, nbytes: int, said: Mapping[str, Any]) -> None:
        """Copy a tensor of ``nbytes`` to an address of ``device``, and give its slot back.

        Raises:
            CodecCorrupt: it would lie outside of the memory.
        """
        slot, use = whole_number(said, "slot", SLOTS - 1), whole_number(said, "use", 1 << 60)
        start = slot * whole_number(said, "size", self._room)
        if start + nbytes > self._room:
            raise CodecCorrupt(f"A payload says that {nbytes} bytes lie at {start} of {self._room} on the GPU.")
        self._driver.copy(device, target, self._address + start, nbytes)
        self._flags.flags[0][slot] = use


def label_of(said: Mapping[str, Any]) -> bytes:
    """What a payload calls its memory. Raises CodecCorrupt: nothing."""
    label = said.get("label")
    if type(label) is not bytes or len(label) != _LABEL_BYTES:
        raise CodecCorrupt("A payload does not name its memory on the GPU.")
    return label


def own(label: bytes) -> Exported | None:
    """What this process exports under that label."""
    return _OWN.get(label)


_Retired = tuple[DeviceDriver, torch.device, int, SharedMemory]
_retired: list[_Retired] = []
_retiring = threading.RLock()
_reaper: list[threading.Thread] = []


def _retire(driver: DeviceDriver, device: torch.device, address: int, flags: SharedMemory) -> None:
    """Free it as soon as nobody else has it open. Whoever opens it looks at the flag once it is counted."""
    flags.flags[1][0] = 1
    with _retiring:
        _retired.append((driver, device, address, flags))
        if not _reaper or not _reaper[0].is_alive():
            _reaper[:] = [threading.Thread(target=_reap, name="device-memory", daemon=True)]
            with suppress(RuntimeError):  # the process ends, and all of it is freed
                _reaper[0].start()


def _reap() -> None:
    while True:
        with _retiring:
            free = [one for one in _retired if one[3].abandoned()]
            _retired[:] = [one for one in _retired if one not in free]
            if not _retired and not free:
                _reaper.clear()
                return
        for driver, device, address, flags in free:
            with suppress(CodecUnsupported):
                driver.free(device, address)
            flags.close()
        sleep(_LOOK_EVERY)


def _let_go(driver: DeviceDriver, device: torch.device, address: int, flags: SharedMemory) -> None:
    with suppress(CodecUnsupported):
        driver.close(device, address)
    flags.close()
