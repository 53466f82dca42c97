"""The exact codec between GPUs of one machine: a tensor crosses in the memory of its GPU, a payload only says where.

Both ends copy once: into memory that the encoder's process exports, on its own GPU; and from there, GPU to GPU. What is
not on a GPU, is small or finds no room crosses as the raw codec has it. Where a payload says things of memory, its
header has ``memory``; see `mesh_core.crossing.device_memory`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mesh_codec.base import Codec, DecodeLimits, Decoder, Encoded, Encoder, Estimate, Quality
from mesh_codec.errors import CodecCorrupt, CodecUnsupported
from mesh_codec.formats import shared_format
from mesh_codec.memory import uint8_view
from mesh_codec.payload import buffers_of, form_of, read_form, whole_number
from mesh_codec.qualities import find
from mesh_codec.raw import RawCodec
from mesh_core.crossing.device_driver import CudaDriver, DeviceDriver
from mesh_core.crossing.device_memory import SLOTS, Exported, Imported, label_of, own
from mesh_core.system.logs import logger
from mesh_core.transport.memory_link import room
from mesh_core.transport.shared_memory import available

log = logger(__name__)

_WORTH_IT = 64 << 10
"""Bytes from which a tensor goes through memory of its GPU."""

_HARDLY_ANY = 1e-3
"""Bits per element that cross the link: a header."""


class DeviceCodec(Codec):
    """Exact, whatever the quality; no state. Setting: ``format``, how memory is exported."""

    name: ClassVar[str] = "device"
    near: ClassVar[bool] = True

    def __init__(self, driver: DeviceDriver | None = None) -> None:
        self._driver = driver or CudaDriver()

    def capabilities(self) -> dict[str, Any]:
        return {"formats": [self._driver.engine] if available() and room() and self._driver.available() else []}

    def settings(self, quality: Quality, peer: Mapping[str, Any]) -> dict[str, Any]:
        find(quality)
        return {"format": shared_format(self.name, self.capabilities()["formats"], peer)}

    def estimate(self, settings: Mapping[str, Any], dtype: torch.dtype) -> Estimate:
        return Estimate(bits=_HARDLY_ANY, engine=str(settings.get("format", "")), label="GPU memory")

    def encoder(self, settings: Mapping[str, Any]) -> Encoder:
        self._check(settings)
        return DeviceEncoder(self._driver)

    def decoder(self, settings: Mapping[str, Any], limits: DecodeLimits = DecodeLimits()) -> Decoder:  # noqa: B008
        self._check(settings)
        return DeviceDecoder(self._driver, limits)

    def _check(self, settings: Mapping[str, Any]) -> None:
        if dict(settings) != {"format": self._driver.engine} or not self.capabilities()["formats"]:
            raise CodecUnsupported(f"This end has no memory of GPUs to share as {str(dict(settings))[:80]}.")


class DeviceEncoder(Encoder):
    """Has memory of its own, which goes with it."""

    def __init__(self, driver: DeviceDriver) -> None:
        self._driver, self._plain = driver, RawCodec().encoder({})
        self._memory: Exported | None = None
        self._refused = False

    def encode(self, tensor: Tensor) -> Encoded:
        form = form_of(tensor)
        if tensor.device.type != self._driver.kind or form.nbytes < _WORTH_IT or self._refused:
            return self._plain.encode(tensor)
        try:
            flat = uint8_view(tensor.detach().resolve_conj().resolve_neg().contiguous())
            if self._memory is None or self._memory.size < form.nbytes or self._memory.device != tensor.device:
                self._memory = None
                self._memory = Exported(self._driver, tensor.device, form.nbytes)
            said = self._memory.put(flat.data_ptr(), form.nbytes)
        except CodecUnsupported as error:
            log.warning("states cross outside of the GPU's memory: %s", error)
            said, self._refused = None, True
        return Encoded({**form.header(), "memory": said}, ()) if said is not None else self._plain.encode(tensor)

    def reset(self) -> None:
        """A message may be lost, and with it a slot that nobody gives back."""
        self._memory, self._refused = None, False


class DeviceDecoder(Decoder):
    """Has the memory open that came last."""

    def __init__(self, driver: DeviceDriver, limits: DecodeLimits) -> None:
        self._driver, self._limits, self._plain = driver, limits, RawCodec().decoder({}, limits)
        self._memory: Imported | None = None

    def decode(self, encoded: Encoded, device: torch.device | str = "cpu") -> Tensor:
        form, target = read_form(encoded.header, self._limits), torch.device(device)
        said = encoded.header.get("memory")
        if said is None:
            return self._plain.decode(encoded, device)
        if not isinstance(said, Mapping) or not form.elements:
            raise CodecCorrupt("A payload does not say where its memory on the GPU is.")
        buffers_of(encoded, form, 0)
        on = target if target.type == self._driver.kind else torch.device(self._driver.kind)
        result = form.empty(on)
        self._fill(result, form.nbytes, said)
        # Any other byte in a bool is undefined behaviour in the kernels that read it.
        if result.dtype is torch.bool and int(uint8_view(result).max()) > 1:
            raise CodecCorrupt("A bool tensor on the GPU holds bytes that are neither 0 nor 1.")
        return result.to(target)

    def _fill(self, result: Tensor, nbytes: int, said: Mapping[str, Any]) -> None:
        label = label_of(said)
        if (mine := own(label)) is not None:
            slot, use = whole_number(said, "slot", SLOTS - 1), whole_number(said, "use", 1 << 60)
            if nbytes > mine.size:
                raise CodecCorrupt(f"A payload says that {nbytes} bytes lie in {mine.size} on the GPU.")
            self._driver.copy(result.device, result.data_ptr(), mine.slot(slot), nbytes)
            mine.read(slot, use)
            return
        if self._memory is None or self._memory.label != label:
            self._memory = None
            self._memory = Imported(self._driver, result.device, said)
        self._memory.copy(result.device, result.data_ptr(), nbytes, said)
