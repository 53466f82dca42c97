"""The engine in NVIDIA's hardware: NVENC and NVDEC through PyNvVideoCodec 2.2; extra ``nvenc``.

Written after the PyNvVideoCodec 2.2 API reference and its samples: `CreateEncoder` takes device frames as objects whose
``cuda()`` gives one ``__cuda_array_interface__`` for each plane; `Encode` keeps frames in flight and `EndEncode` drains
them; `CreateDecoder` with `DisplayDecodeLatencyType.LOW` and packets flagged ``ENDOFPICTURE`` shows each picture at
once. Both sides hold 10-bit pixels in the upper bits of 16. What the documents leave open (whether an encoder goes on
predicting after it was drained, where a decoder puts 10 bits) is found out by the probe, not believed.

The hardware shows a damaged picture as well as it can, without a word: packets are covered by the payload's checksum,
and `bitstream.check_unit` has seen them first.
"""

from __future__ import annotations

import logging
from base64 import b64decode
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from mesh_codec.errors import CodecCorrupt, CodecError, CodecUnsupported
from mesh_codec.foreign import named
from mesh_codec.hevc.bitstream import check_unit, is_key
from mesh_codec.hevc.cuda_context import context_of
from mesh_codec.hevc.engine import Engine, FrameDecoder, FrameEncoder, RateControl
from mesh_codec.hevc.geometry import SHORTEST_SIDE, Geometry
from mesh_codec.quantiser import Grid

_log = logging.getLogger(__name__)

_FORMATS = {8: "YUV444", 10: "YUV444_16BIT"}
_SPARE_BITS = 6
"""Below the 10 bits of a pixel in its 16."""

_PROBE = Geometry.of(Grid(3, SHORTEST_SIDE**2), bits=10)
_GREY = b64decode(
    "AAAAAUABDAH//wQIAAADAJwIAAADAAAeugJAAAAAAUIBAQQIAAADAJwIAAADAAAekAJEBImy3SUmFzQEAAADAAQAAAMAZCAAAAAB"
    "RAHAcDBgESAAAAEoAa1gBUYU6EDjwYAAAAMAAAMAAAiY"
)
"""One IDR picture of `_PROBE`, all pixels in the middle, by libx265."""


class NvVideoEngine(Engine):
    """``module`` and ``device`` are PyNvVideoCodec and torch's current CUDA device, unless given."""

    encodes_with: ClassVar[str] = "nvenc"
    decodes_with: ClassVar[str] = "nvdec"

    def __init__(self, module: Any = None, device: torch.device | None = None) -> None:
        self._given, self._device = module, device

    def probe(self) -> tuple[bool, bool]:
        return self._probed

    def engines(self) -> int:
        """How many hardware encoders or decoders work side by side here, whichever are more."""
        return self._counted

    @cached_property
    def _counted(self) -> int:
        # Asked once: the driver takes some 60 ms to answer, and codecs are chosen again and again.
        counts = (self._count_encoders, self._count_decoders)
        return max(count() if able else 0 for count, able in zip(counts, self._probed, strict=True))

    def _count_encoders(self) -> int:
        return self._engines(lambda: self._module.GetEncoderCaps(gpuid=self._gpu, codec="hevc")["num_encoder_engines"])

    def _count_decoders(self) -> int:
        nvc = self._module
        return self._engines(
            lambda: nvc.GetDecoderCaps(
                gpuid=self._gpu,
                codec=nvc.cudaVideoCodec.HEVC,
                chromaformat=getattr(nvc.cudaVideoChromaFormat, "444"),
                bitdepth=8,
            )["num_decoder_engines"]
        )

    def _engines(self, ask: Callable[[], Any]) -> int:
        """The count that ``ask`` gives; at least 1, since the probe has found one at work."""
        try:
            with named(CodecUnsupported, "the number of video engines is not known"), context_of(self._place).current():
                return max(1, int(ask()))
        except CodecUnsupported as error:
            _log.info("%s", error)
            return 1

    @property
    def _gpu(self) -> int:
        return self._place.index or 0

    def encoder(self, geometry: Geometry, control: RateControl, device: torch.device) -> FrameEncoder:
        return _NvencEncoder(self._module, geometry, control, self._place)

    def decoder(self, geometry: Geometry, device: torch.device) -> FrameDecoder:
        return _NvdecDecoder(self._module, geometry, self._place, self._shift)

    @cached_property
    def _module(self) -> Any:
        if self._given is not None:
            return self._given
        with named(CodecUnsupported, "PyNvVideoCodec cannot be used"):
            import PyNvVideoCodec

            return PyNvVideoCodec

    @property
    def _place(self) -> torch.device:
        return self._device or torch.device("cuda", torch.cuda.current_device())

    @cached_property
    def _probed(self) -> tuple[bool, bool]:
        if self._given is None and not torch.cuda.is_available():
            return False, False
        able: list[bool] = []
        for what, attempt in (("NVENC", self._try_encoding), ("NVDEC", self._try_decoding)):
            try:
                attempt()
                able.append(True)
            except CodecError as error:
                _log.info("%s is not used: %s", what, error)
                able.append(False)
        return able[0], able[1]

    def _try_encoding(self) -> None:
        """Three frames, each drained: that each comes out by itself, and that a drained encoder goes on."""
        frames = torch.full((1, 3, _PROBE.height, _PROBE.width), _PROBE.middle, dtype=_PROBE.dtype)
        session = self.encoder(_PROBE, RateControl(qp=30, lossless=False), self._place)
        try:
            for key in (True, False, True):
                (unit,) = session.encode(frames, key=key)
                check_unit(memoryview(unit), _PROBE, key=key or is_key(unit))
        finally:
            session.close()

    def _try_decoding(self) -> None:
        if self._shift not in (0, _SPARE_BITS):
            raise CodecUnsupported(f"NVDEC puts 10-bit pixels {self._shift} bits up.")

    @cached_property
    def _shift(self) -> int:
        """Bits by which decoded 10-bit pixels are to be shifted down."""
        session = _NvdecDecoder(self._module, _PROBE, self._place, 0)
        try:
            pixels = session.decode([memoryview(_GREY)]).to(torch.int32) & 0xFFFF
        finally:
            session.close()
        found = {int(value): shift for shift in range(7) for value in [_PROBE.middle << shift]}
        lowest, highest = int(pixels.min()), int(pixels.max())
        if lowest != highest or lowest not in found:
            raise CodecUnsupported(f"NVDEC decodes grey to pixels from {lowest} to {highest}.")
        return found[lowest]


class _Session:
    """An open session of the hardware: opened, used and closed in torch's context, also where nobody closes it."""

    _session: Any = None

    def __init__(self, nvc: Any, geometry: Geometry, device: torch.device) -> None:
        self._nvc, self._geometry, self._device = nvc, geometry, device
        self._context = context_of(device)

    def close(self) -> None:
        with self._context.current():
            self._session = None

    def __del__(self) -> None:
        if self._session is not None:
            self.close()


class _NvencEncoder(_Session, FrameEncoder):
    def __init__(self, nvc: Any, geometry: Geometry, control: RateControl, device: torch.device) -> None:
        super().__init__(nvc, geometry, device)
        # An endless group of pictures, the default, has no B frames and no key frame unasked.
        options = {"codec": "hevc", "preset": "P1", "repeatspspps": 1, "gpu_id": device.index or 0}
        options |= {"cudacontext": self._context.handle}
        if control.lossless:
            options |= {"tuning_info": "lossless"}
        else:
            options |= {"tuning_info": "ultra_low_latency", "rc": "constqp", "constqp": control.qp}
        with named(CodecUnsupported, "NVENC opens no session"), self._context.current():
            self._session = nvc.CreateEncoder(
                geometry.width, geometry.height, _FORMATS[geometry.bits], False, **options
            )

    def encode(self, frames: Tensor, *, key: bool) -> list[bytes]:
        nvc, units = self._nvc, []
        on_device = frames.to(self._device)
        if self._geometry.bits == 10:
            on_device = on_device << _SPARE_BITS
        if self._device.type == "cuda":
            # The encoder copies on a stream of its own.
            torch.cuda.current_stream(self._device).synchronize()
        with named(CodecUnsupported, "NVENC failed"), self._context.current():
            for number, planes in enumerate(on_device.contiguous()):
                picture = nvc.NV_ENC_PIC_PARAMS()
                picture.encodePicFlags = 0
                if key and not number:
                    flags = nvc.NV_ENC_PIC_FLAGS
                    picture.encodePicFlags = int(flags.FORCEIDR) | int(flags.OUTPUT_SPSPPS)
                units += self._session.Encode(_Frame(planes), picture)
            if len(units) < len(frames):
                units += self._session.EndEncode()
        if len(units) != len(frames):
            raise CodecUnsupported(f"NVENC made {len(units)} packets of {len(frames)} frames.")
        return [bytes(unit["data"]) for unit in units]


class _NvdecDecoder(_Session, FrameDecoder):
    def __init__(self, nvc: Any, geometry: Geometry, device: torch.device, shift: int) -> None:
        super().__init__(nvc, geometry, device)
        self._shift = shift
        with named(CodecUnsupported, "NVDEC opens no session"), self._context.current():
            self._session = nvc.CreateDecoder(
                gpuid=device.index or 0,
                codec=nvc.cudaVideoCodec.HEVC,
                cudacontext=self._context.handle,
                usedevicememory=True,
                maxwidth=geometry.width,
                maxheight=geometry.height,
                latency=nvc.DisplayDecodeLatencyType.LOW,
            )

    def decode(self, units: Sequence[memoryview]) -> Tensor:
        geometry = self._geometry
        pictures: list[Tensor] = []
        for unit in units:
            data = np.frombuffer(unit, dtype=np.uint8)
            with named(CodecCorrupt, "NVDEC cannot decode a video packet"), self._context.current():
                packet = self._nvc.PacketData()
                packet.bsl, packet.bsl_data = len(data), data.ctypes.data
                packet.decode_flag = self._nvc.VideoPacketFlag.ENDOFPICTURE
                shown = self._session.Decode(packet)
                # The decoder writes its next picture into the same memory.
                pictures += [from_dlpack(picture).clone() for picture in shown]
        lines = 3 * geometry.height
        if len(pictures) != len(units) or any(p.shape != (lines, geometry.width) for p in pictures):
            raise CodecCorrupt(f"NVDEC showed pictures of {[tuple(p.shape) for p in pictures[:3]]}.")
        planes = torch.stack(pictures).view(len(units), 3, geometry.height, geometry.width)
        if geometry.bits == 8:
            return planes
        return (planes.view(torch.int16).to(torch.int32) & 0xFFFF).bitwise_right_shift(self._shift).to(torch.int16)


class _Frame:
    """Planes [3, height, width] on the device, as PyNvVideoCodec takes them."""

    def __init__(self, planes: Tensor) -> None:
        self._planes = planes

    def cuda(self) -> list[_Plane]:
        return [_Plane(plane) for plane in self._planes]


class _Plane:
    def __init__(self, plane: Tensor) -> None:
        size = plane.element_size()
        (height, width), line = plane.shape, plane.stride(0) * size
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": (height, width, 1),
            "strides": (line, size, size),
            "typestr": f"|u{size}",
            "data": (plane.data_ptr(), False),
        }
