"""The engine for NVENC and NVDEC, on a stand-in for the library that it calls. What the hardware does is not shown."""

from __future__ import annotations

import logging

import pytest
import torch

from mesh_codec import CodecCorrupt, CodecUnsupported
from mesh_codec.hevc import HevcCodec
from mesh_codec.hevc.engines import Engines
from mesh_codec.hevc.nvvideo import NvVideoEngine
from mesh_codec.hevc.pyav import PyAvEngine

from .fake_nvvideo import FakeNvVideo
from .test_hevc import relative_error, sequence

CPU = torch.device("cpu")
SOFTWARE = HevcCodec(Engines([PyAvEngine()]))


def hardware(**habits) -> HevcCodec:
    return HevcCodec(Engines([NvVideoEngine(FakeNvVideo(**habits), CPU)]))


@pytest.mark.parametrize(
    "settings", [{}, {"bits": 10}, {"lossless": True}, {"tile": 2}, {"bits": 10, "tile": 2}], ids=str
)
def test_what_one_engine_codes_the_other_decodes(settings):
    for coding, decoding in ((hardware(), SOFTWARE), (SOFTWARE, hardware()), (hardware(), hardware())):
        encoder, decoder, check = coding.encoder(settings), decoding.decoder(settings), SOFTWARE.decoder(settings)
        for number, tensor in enumerate(sequence(4)):
            coded = encoder.encode(tensor)
            assert coded.header["index"] == number
            back = decoder.decode(coded)
            assert torch.equal(back, check.decode(coded))
            assert relative_error(tensor, back) < 0.3


def test_an_encoder_that_forgets_when_drained_is_used_all_the_same():
    encoder, decoder = hardware(forgets=True).encoder({}), SOFTWARE.decoder({})
    for tensor in sequence(3):
        assert relative_error(tensor, decoder.decode(encoder.encode(tensor))) < 0.3


def test_an_encoder_that_keeps_frames_back_is_not_used(caplog):
    codec = hardware(drains=False)
    with caplog.at_level(logging.INFO):
        assert codec.capabilities()["encoders"] == []
        assert codec.capabilities()["decoders"] == ["nvdec"]
    assert [record.getMessage() for record in caplog.records] == [
        "NVENC is not used: NVENC made 0 packets of 1 frames. Try: another quality or codec"
    ]


def test_a_gpu_without_nvenc_says_so_once_and_software_encodes(caplog):
    fake = FakeNvVideo(encodes=False)
    codec = HevcCodec(Engines([NvVideoEngine(fake, CPU), PyAvEngine()]))
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            found = codec.capabilities()
    assert (found["encoders"], found["decoders"]) == (["libx265"], ["nvdec", "ffmpeg"])
    assert len(caplog.records) == 1 and "nvEncOpenEncodeSessionEx returned error 2" in caplog.text
    encoder, decoder = codec.encoder({}), codec.decoder({})
    for tensor in sequence(2):
        assert relative_error(tensor, decoder.decode(encoder.encode(tensor))) < 0.3


def test_where_no_engine_encodes_the_negotiation_goes_on_without():
    codec = hardware(encodes=False)
    assert codec.capabilities()["formats"] == []
    with pytest.raises(CodecUnsupported):
        codec.settings("fast", SOFTWARE.capabilities())


def test_when_the_hardware_is_out_of_sessions_software_encodes():
    fake = FakeNvVideo(sessions=2)
    codec = HevcCodec(Engines([NvVideoEngine(fake, CPU), PyAvEngine()]))
    tensors = sequence(2, tokens=1024, channels=1030)
    first, second = codec.encoder({}), codec.encoder({})
    for tensor in tensors:
        for encoder in (first, second):
            encoder.encode(tensor)
    assert [type(s).__module__.rpartition(".")[2] for s in first._chain.sessions] == ["nvvideo"] * 2
    assert [type(s).__module__.rpartition(".")[2] for s in second._chain.sessions] == ["pyav"] * 2
    first.close()
    assert fake.open == 0


def test_sessions_stay_open_over_key_frames():
    fake = FakeNvVideo()
    encoder = HevcCodec(Engines([NvVideoEngine(fake, CPU)])).encoder({})
    for tensor in sequence(3):
        encoder.reset()
        encoder.encode(tensor)
    assert fake.opened == 2  # the probe's and the stream's


def test_each_engine_of_the_gpu_gets_a_strip():
    peer = SOFTWARE.capabilities()
    assert hardware().settings("fast", peer)["strips"] == 3
    assert SOFTWARE.settings("fast", hardware().capabilities())["strips"] == 3
    assert SOFTWARE.settings("fast", peer)["strips"] == 2
    assert hardware(counts=False).settings("fast", peer)["strips"] == 2


@pytest.mark.parametrize("shift", [0, 6])
def test_decoded_bits_are_put_where_they_belong(shift):
    decoder, check = hardware(shift=shift).decoder({"bits": 10}), SOFTWARE.decoder({"bits": 10})
    coded = SOFTWARE.encoder({"bits": 10}).encode(sequence(1)[0])
    assert torch.equal(decoder.decode(coded), check.decode(coded))


def test_a_decoder_that_puts_bits_elsewhere_is_not_used():
    assert hardware(shift=3).capabilities()["decoders"] == []


def test_a_picture_that_the_hardware_does_not_show_is_an_error():
    coded = SOFTWARE.encoder({}).encode(sequence(1)[0])
    packet = bytes(coded.buffers[2])
    from .test_hevc_faults import with_packet

    decoder = hardware().decoder({})
    start = packet.index(b"\x00\x00\x01\x44\x01") + 5  # picture parameter set: without it nothing is shown
    with pytest.raises(CodecCorrupt):
        decoder.decode(with_packet(coded, packet[:start] + b"\xff" + packet[start + 1 :]))
    assert torch.equal(decoder.decode(coded), SOFTWARE.decoder({}).decode(coded))
