"""The calls of PyNvVideoCodec 2.2.4 that the engine makes, over libx265 and FFmpeg, on memory of the CPU.

Signatures, types and habits after the 2.2 API reference, the docstrings of the 2.2.4 wheel and its samples: `Encode`
with NV_ENC_PIC_PARAMS gives a list of dictionaries with the keys data, timestamp and picture_type; three frames stay in
flight until `EndEncode`; device frames give a list of planes with ``__cuda_array_interface__`` from ``cuda()``; decoded
frames go through DLPack as [3 * height, width]; 10-bit pixels lie in the upper bits of 16.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from fractions import Fraction

import av
import numpy as np
import torch
from av.video.frame import PictureType

_LAYOUTS = {"YUV444": ("yuv444p", np.uint8, 0), "YUV444_16BIT": ("yuv444p10le", np.uint16, 6)}


class PyNvVCException(Exception): ...


class NV_ENC_PIC_FLAGS(IntEnum):
    FORCEINTRA, FORCEIDR, OUTPUT_SPSPPS, EOS = 1, 2, 4, 8


class NV_ENC_PIC_PARAMS:
    encodePicFlags = 0
    inputTimeStamp = 0


class VideoPacketFlag(IntEnum):
    ENDOFPICTURE = 8


class DisplayDecodeLatencyType(IntEnum):
    NATIVE, LOW, ZERO = range(3)


class cudaVideoCodec(IntEnum):
    HEVC = 8


cudaVideoChromaFormat = IntEnum("cudaVideoChromaFormat", {"420": 1, "422": 2, "444": 3})


class PacketData:
    bsl = 0
    bsl_data = 0
    decode_flag = 0


class FakeNvVideo:
    """The module. ``encodes`` is whether the GPU has NVENC; ``sessions`` how many it opens at a time; ``in_flight``
    frames stay in an encoder, and ``drains`` says whether `EndEncode` gives them out; with ``forgets`` the frame after
    it is an IDR picture; decoded 10-bit pixels are ``shift`` bits up; decoded pixels are ``off_by`` too
    large, but where all are grey; ``counts`` is whether the number of engines is told."""

    NV_ENC_PIC_FLAGS, NV_ENC_PIC_PARAMS, PacketData = NV_ENC_PIC_FLAGS, NV_ENC_PIC_PARAMS, PacketData
    VideoPacketFlag, DisplayDecodeLatencyType = VideoPacketFlag, DisplayDecodeLatencyType
    cudaVideoCodec, cudaVideoChromaFormat = cudaVideoCodec, cudaVideoChromaFormat

    def __init__(
        self, *, encodes=True, sessions=8, in_flight=3, drains=True, forgets=False, shift=6, off_by=0, counts=True
    ):
        self.encodes, self.sessions, self.in_flight, self.drains = encodes, sessions, in_flight, drains
        self.forgets, self.shift, self.off_by = forgets, shift, off_by
        self.counts, self.opened, self.open = counts, 0, 0

    def GetEncoderCaps(self, gpuid=0, codec="h264"):
        return {"num_encoder_engines": 3} if self.counts else {}

    def GetDecoderCaps(self, gpuid, codec, chromaformat, bitdepth):
        assert chromaformat == 3
        return {"num_decoder_engines": 2}

    def CreateEncoder(self, width, height, fmt, usecpuinputbuffer, **options):
        if not self.encodes:
            raise PyNvVCException("CreateEncoder : nvEncOpenEncodeSessionEx returned error 2")
        if self.open >= self.sessions:
            raise PyNvVCException("CreateEncoder : nvEncOpenEncodeSessionEx returned error 10")
        assert not usecpuinputbuffer and options["codec"] == "hevc" and options["repeatspspps"]
        self.opened += 1
        return _Encoder(self, width, height, fmt, options)

    def CreateDecoder(self, gpuid, codec, cudacontext, usedevicememory, maxwidth, maxheight, latency):
        assert (
            not cudacontext
            and codec == cudaVideoCodec.HEVC
            and usedevicememory
            and latency == DisplayDecodeLatencyType.LOW
        )
        return _Decoder(maxwidth, maxheight, self.shift, self.off_by)


class _Encoder:
    def __init__(self, module, width, height, fmt, options):
        module.open += 1
        self._module, self._size, self._waiting, self._count, self._idr = module, (height, width), [], 0, False
        self._layout, self._kind, self._spare = _LAYOUTS[fmt]
        self._context = av.CodecContext.create("libx265", "w")
        self._context.width, self._context.height, self._context.pix_fmt = width, height, self._layout
        self._context.time_base = Fraction(1, 25)
        rate = "lossless=1" if options["tuning_info"] == "lossless" else f"qp={options['constqp']}"
        self._context.options = {
            "preset": "ultrafast",
            "tune": "zerolatency",
            "forced-idr": "1",
            "x265-params": f"log-level=none:repeat-headers=1:keyint=-1:open-gop=0:scenecut=0:pools=none:{rate}",
        }

    def __del__(self):
        self._module.open -= 1

    def Encode(self, frame, parameters):
        picture = av.VideoFrame(self._size[1], self._size[0], self._layout)
        picture.pts = self._count
        self._count += 1
        key = parameters.encodePicFlags & NV_ENC_PIC_FLAGS.FORCEIDR or self._idr
        picture.pict_type, self._idr = PictureType.I if key else PictureType.NONE, False
        for target, plane in zip(picture.planes, frame.cuda(), strict=True):
            lines = np.frombuffer(memoryview(target), self._kind).reshape(self._size[0], -1)
            lines[:, : self._size[1]] = self._read(plane.__cuda_array_interface__) >> self._spare
        packets = self._context.encode(picture)
        self._waiting += [{"data": bytes(p), "timestamp": p.pts, "picture_type": 3} for p in packets]
        return self._give(len(self._waiting) - self._module.in_flight)

    def _read(self, view):
        (height, width, one), kind = view["shape"], np.dtype(self._kind)
        assert (height, width, one) == (*self._size, 1) and view["typestr"] == f"|u{kind.itemsize}"
        assert view["strides"] == (width * kind.itemsize, kind.itemsize, kind.itemsize)
        memory = (ctypes.c_char * (height * width * kind.itemsize)).from_address(view["data"][0])
        return np.frombuffer(memory, kind).reshape(height, width)

    def EndEncode(self):
        self._idr = self._module.forgets
        return self._give(len(self._waiting) - (0 if self._module.drains else 1))

    def _give(self, count):
        given, self._waiting = self._waiting[: max(0, count)], self._waiting[max(0, count) :]
        return given


class _Decoder:
    def __init__(self, width, height, shift, off_by):
        self._size, self._shift, self._off_by = (height, width), shift, off_by
        self._context = av.CodecContext.create("hevc", "r")
        self._context.thread_count = 1

    def Decode(self, packet):
        assert packet.decode_flag == VideoPacketFlag.ENDOFPICTURE
        data = ctypes.string_at(packet.bsl_data, packet.bsl)
        try:
            return [_DecodedFrame(frame, self._shift, self._off_by) for frame in self._context.decode(av.Packet(data))]
        except av.FFmpegError:
            # The hardware says nothing.
            return []


class _DecodedFrame:
    def __init__(self, frame, shift, off_by):
        wide = "10" in frame.format.name
        kind = np.uint16 if wide else np.uint8
        planes = [np.frombuffer(memoryview(p), kind).reshape(frame.height, -1)[:, : frame.width] for p in frame.planes]
        planes = [plane + (off_by if plane.min() != plane.max() else 0) for plane in planes]
        self._tensor = torch.from_numpy(np.concatenate(planes) << (shift if wide else 0))

    def __dlpack__(self, stream=None, **_):
        return self._tensor.__dlpack__()

    def __dlpack_device__(self):
        return self._tensor.__dlpack_device__()
