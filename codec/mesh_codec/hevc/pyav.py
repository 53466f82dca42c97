"""The software engine: libx265 and FFmpeg's HEVC decoder through PyAV. Runs anywhere; extra ``hevc``.

Each session works on one thread, strips run side by side: frame threads would hold frames back, and slice threads
tear a damaged picture in ways that depend on timing. The encoder adds a hash of each picture, which the decoder checks:
a picture that had to be concealed, or was predicted from another reference, is an error and never wrong pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesh_codec.errors import CodecCorrupt, CodecUnsupported
from mesh_codec.hevc.engine import Engine, FrameDecoder, FrameEncoder, RateControl
from mesh_codec.hevc.geometry import LONGEST_SIDE, Geometry

if TYPE_CHECKING:
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame

_log = logging.getLogger(__name__)

_FORMATS = {8: "yuv444p", 10: "yuv444p10le"}
_TYPES: dict[int, np.dtype[Any]] = {8: np.dtype(np.uint8), 10: np.dtype("<u2")}

_X265 = (
    "log-level=none:info=0:repeat-headers=1:hash=1:pools=none:frame-threads=1:no-wpp=1:keyint=-1:open-gop=0:scenecut=0:"
    "ipratio=1:deblock=0:sao=0:psy-rd=0:psy-rdoq=0:weightp=0"
)
"""No picture is held back; no filter or rate control that takes what we code for a film. The same quantiser step for
key and predicted pictures."""

_DECODER = {
    "err_detect": "crccheck+bitstream+buffer+explode",
    "max_pixels": str((LONGEST_SIDE + 128) ** 2),
    "flags": "low_delay",
}


class PyAvEngine(Engine):
    """libx265 encodes, FFmpeg decodes; each is there if the installed PyAV was built with it."""

    encodes_with: ClassVar[str] = "libx265"
    decodes_with: ClassVar[str] = "ffmpeg"

    def probe(self) -> tuple[bool, bool]:
        return self._probed

    @cached_property
    def _probed(self) -> tuple[bool, bool]:
        try:
            import av
            import av.codec
        except ImportError as error:
            _log.info("no video coding in software: %s. Try: pip install comfyui-mesh-codec[hevc]", error)
            return False, False
        encodes, decodes = "libx265" in av.codec.codecs_available, "hevc" in av.codec.codecs_available
        if not (encodes and decodes):
            _log.info("this build of FFmpeg has libx265: %s, an HEVC decoder: %s", encodes, decodes)
        return encodes, decodes

    def encoder(self, geometry: Geometry, control: RateControl, device: torch.device) -> FrameEncoder:
        return _X265Encoder(geometry, control)

    def decoder(self, geometry: Geometry, device: torch.device) -> FrameDecoder:
        return _FfmpegDecoder(geometry)


class _X265Encoder(FrameEncoder):
    def __init__(self, geometry: Geometry, control: RateControl) -> None:
        import av

        self._geometry, self._count = geometry, 0
        context: VideoCodecContext = av.CodecContext.create("libx265", "w")
        context.width, context.height = geometry.width, geometry.height
        context.pix_fmt = _FORMATS[geometry.bits]
        context.time_base = Fraction(1, 25)
        rate = "lossless=1" if control.lossless else f"qp={control.qp}"
        context.options = {
            "preset": "ultrafast",
            "tune": "zerolatency",
            "forced-idr": "1",
            "x265-params": f"{_X265}:{rate}",
        }
        try:
            context.open()
        except av.FFmpegError as error:
            raise CodecUnsupported(f"libx265 cannot be opened: {error}") from error
        self._context = context

    def encode(self, frames: Tensor, *, key: bool) -> list[bytes]:
        import av

        units: list[bytes] = []
        try:
            for place, planes in enumerate(frames.cpu().numpy()):
                frame = self._frame(planes, key=key and place == 0)
                units.append(b"".join(bytes(packet) for packet in self._context.encode(frame)))
        except av.FFmpegError as error:
            raise CodecUnsupported(f"libx265 failed: {error}") from error
        return units

    def _frame(self, planes: NDArray[np.integer], *, key: bool) -> VideoFrame:
        import av
        from av.video.frame import PictureType

        frame: VideoFrame = av.VideoFrame(self._geometry.width, self._geometry.height, _FORMATS[self._geometry.bits])
        frame.pts = self._count
        self._count += 1
        frame.pict_type = PictureType.I if key else PictureType.NONE
        for target, plane in zip(_planes(frame, self._geometry), planes, strict=True):
            target[:] = plane
        return frame


class _FfmpegDecoder(FrameDecoder):
    def __init__(self, geometry: Geometry) -> None:
        import av

        self._geometry = geometry
        context: VideoCodecContext = av.CodecContext.create("hevc", "r")
        context.thread_count = 1
        context.options = _DECODER
        self._context = context

    def decode(self, units: Sequence[memoryview]) -> Tensor:
        geometry = self._geometry
        shape = (len(units), 3, geometry.height, geometry.width)
        result = np.empty(shape, dtype=_TYPES[geometry.bits])
        for unit, planes in zip(units, result, strict=True):
            for source, plane in zip(_planes(self._picture(unit), geometry), planes, strict=True):
                plane[:] = source
        return torch.from_numpy(result if geometry.bits == 8 else result.view(np.int16))

    def _picture(self, unit: memoryview) -> VideoFrame:
        import av

        try:
            pictures = self._context.decode(av.Packet(unit))
        except av.FFmpegError as error:
            raise CodecCorrupt(f"FFmpeg cannot decode a video packet: {error}") from error
        if len(pictures) != 1 or pictures[0].is_corrupt:
            raise CodecCorrupt(f"A video packet held {len(pictures)} whole pictures where 1 belongs.")
        picture = pictures[0]
        size = (picture.width, picture.height, picture.format.name)
        if size != (self._geometry.width, self._geometry.height, _FORMATS[self._geometry.bits]):
            raise CodecCorrupt(f"A video packet held a picture of {size}.")
        return picture


def _planes(frame: VideoFrame, geometry: Geometry) -> list[NDArray[np.integer]]:
    """Views of the three planes, [height, width]."""
    kind = _TYPES[geometry.bits]
    lines = [np.frombuffer(memoryview(plane), dtype=kind).reshape(geometry.height, -1) for plane in frame.planes]
    return [line[:, : geometry.width] for line in lines]
