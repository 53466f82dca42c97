from __future__ import annotations

import io

import av
import numpy as np
import pytest
import torch

from mesh_codec import CodecError, CodecStateLost, CodecUnsupported
from mesh_codec.hevc import HevcCodec
from mesh_codec.hevc.bitstream import check_unit
from mesh_codec.hevc.geometry import Geometry
from mesh_codec.hevc.pixels import Calibration
from mesh_codec.quantiser import Grid

from .structured import activations

CODEC = HevcCodec()


def sequence(count: int, *, tokens: int = 256, channels: int = 64, change: float = 0.1) -> list[torch.Tensor]:
    """Tensors of which each differs from the one before by ``change`` of the channels' deviation."""
    generator = torch.Generator().manual_seed(0)
    state = activations(tokens, channels, dtype=torch.float32)
    found = [state.bfloat16()]
    for _ in range(count - 1):
        state = state + change * state.std(0) * torch.randn(state.shape, generator=generator)
        found.append(state.bfloat16())
    return found


def relative_error(tensor: torch.Tensor, back: torch.Tensor) -> float:
    """Root mean square, in deviations of the typical channel."""
    noise = (tensor.double() - back.double()).square().mean(0)
    return float((noise.median() / tensor.double().var(0).median()).sqrt())


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize(("qp", "most"), [(0, 0.03), (10, 0.08), (18, 0.2), (28, 0.6)])
def test_the_error_follows_qp(bits, qp, most):
    tensor = activations(256, 64)
    settings = {"qp": qp, "bits": bits}
    back = CODEC.decoder(settings).decode(CODEC.encoder(settings).encode(tensor))
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert most / 5 < relative_error(tensor, back) < most


@pytest.mark.parametrize("bits", [8, 10])
def test_lossless_video_gives_back_exactly_the_pixels(bits):
    settings = {"lossless": True, "bits": bits}
    encoder, decoder = CODEC.encoder(settings), CODEC.decoder(settings)
    for tensor in sequence(3):
        calibration = encoder._chain.calibration if encoder._chain else Calibration.measured(tensor.t(), bits)
        pixels, outside = calibration.to_pixels(tensor.t())
        back = decoder.decode(encoder.encode(tensor))
        expected = calibration.to_values(pixels, torch.bfloat16).t()
        assert torch.equal(torch.where(outside.t(), tensor, expected), back)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "shape", [(), (0,), (3, 0, 5), (1,), (7,), (1, 1, 129), (3, 67, 5), (2, 33, 31), (65, 1)], ids=str
)
def test_any_shape(shape, dtype):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    settings = {"qp": 4}
    back = CODEC.decoder(settings).decode(CODEC.encoder(settings).encode(tensor))
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert (back.float() - tensor.float()).abs().nan_to_num().max().item() < 1 if tensor.numel() else True


def test_strides_do_not_matter():
    tensor = activations(96, 80)
    settings = {"qp": 12}
    dense = CODEC.encoder(settings).encode(tensor).buffers
    padded = torch.zeros(96, 160, dtype=tensor.dtype)
    padded[:, ::2] = tensor
    for other in (tensor.t().contiguous().t(), padded[:, ::2]):
        assert not other.is_contiguous()
        assert CODEC.encoder(settings).encode(other).buffers == dense


def test_the_same_tensors_give_the_same_bytes():
    def coded() -> list:
        encoder = CODEC.encoder({"qp": 12, "strips": 2})
        return [encoder.encode(tensor).buffers for tensor in sequence(3, tokens=1024, channels=1030)]

    assert coded() == coded()


def test_what_is_not_finite_or_out_of_range_crosses_exactly():
    tensor = activations(256, 64, dtype=torch.float32)
    tensor[3, 4], tensor[5, 6], tensor[7, 8], tensor[9, 10] = torch.nan, torch.inf, -torch.inf, 1e30
    coded = CODEC.encoder({}).encode(tensor)
    back = CODEC.decoder({}).decode(coded)
    assert coded.header["outliers"] == 4
    assert back[3, 4].isnan() and back[5, 6] == torch.inf and back[7, 8] == -torch.inf and back[9, 10] == 1e30
    assert back.nan_to_num(0, 0, 0).abs().sort().values.view(-1)[-2] < 100


@pytest.mark.parametrize("value", [0.0, 1 / 3, -7e4, torch.inf, torch.nan])
def test_what_does_not_vary_is_exact(value):
    tensor = torch.full((128, 24), value)
    back = CODEC.decoder({}).decode(CODEC.encoder({}).encode(tensor))
    assert torch.equal(tensor.view(torch.int32), back.view(torch.int32))


def test_a_constant_channel_among_others_is_exact():
    tensor = activations(256, 64)
    tensor[:, 5] = 0.3
    back = CODEC.decoder({}).decode(CODEC.encoder({}).encode(tensor))
    assert torch.equal(back[:, 5], tensor[:, 5])


def test_massive_channels_and_tokens_do_not_set_the_range():
    plain = activations(256, 64)
    massive = plain.clone()
    massive[:, 3] *= 300
    massive[100] *= 300
    settings = {"qp": 12}
    before = relative_error(plain, CODEC.decoder(settings).decode(CODEC.encoder(settings).encode(plain)))
    coded = CODEC.encoder(settings).encode(massive)
    back = CODEC.decoder(settings).decode(coded)
    others = [t for t in range(256) if t != 100]
    assert relative_error(massive[others], back[others]) < 1.3 * before
    channel = massive[others, 3].double()
    assert (channel - back[others, 3].double()).std() < 0.3 * channel.std()
    assert coded.header["outliers"] < 2 * 64


def test_later_tensors_of_a_stream_are_predicted_and_errors_do_not_add_up():
    settings = {"qp": 8, "bits": 10}
    encoder, decoder = CODEC.encoder(settings), CODEC.decoder(settings)
    tensors = sequence(12)
    coded = [encoder.encode(tensor) for tensor in tensors]
    assert [c.header["index"] for c in coded] == list(range(12))
    assert max(c.nbytes for c in coded[1:]) < 0.5 * coded[0].nbytes
    errors = [relative_error(t, decoder.decode(c)) for t, c in zip(tensors, coded, strict=True)]
    assert max(errors[6:]) < 1.2 * max(errors[1:6])


def test_prediction_can_be_left_out():
    encoder = CODEC.encoder({"temporal": False})
    assert all(encoder.encode(tensor).header["index"] == 0 for tensor in sequence(3))


def test_a_reset_another_shape_and_another_scale_make_a_key():
    encoder, decoder = CODEC.encoder({}), CODEC.decoder({})
    first, second = sequence(2)
    for tensor, key in (
        (first, True),
        (second, False),
        (second * 4, True),
        (second[:128], True),
        (second[:128], False),
    ):
        coded = encoder.encode(tensor)
        assert (coded.header["index"] == 0) is key
        assert relative_error(tensor, decoder.decode(coded)) < 0.2
    encoder.reset()
    assert encoder.encode(second[:128]).header["index"] == 0


def test_empty_tensors_do_not_break_a_chain():
    encoder, decoder = CODEC.encoder({}), CODEC.decoder({})
    first, second = sequence(2)
    decoder.decode(encoder.encode(first))
    decoder.decode(encoder.encode(torch.empty(0, 5)))
    coded = encoder.encode(second)
    assert coded.header["index"] == 1
    assert relative_error(second, decoder.decode(coded)) < 0.2


def test_a_lost_reference_is_named_and_a_key_goes_on():
    encoder, decoder = CODEC.encoder({}), CODEC.decoder({})
    tensors = sequence(5)
    coded = [encoder.encode(tensor) for tensor in tensors[:4]]
    with pytest.raises(CodecStateLost):
        CODEC.decoder({}).decode(coded[1])
    decoder.decode(coded[0])
    for lost in (coded[2], coded[3]):
        with pytest.raises(CodecStateLost):
            decoder.decode(lost)
    # Nothing was harmed: what comes in order still decodes, and what comes twice does not.
    decoder.decode(coded[1])
    with pytest.raises(CodecStateLost):
        decoder.decode(coded[1])
    encoder.reset()
    assert relative_error(tensors[4], decoder.decode(encoder.encode(tensors[4]))) < 0.2


def test_streams_do_not_share_references():
    encoders = [CODEC.encoder({}) for _ in range(2)]
    decoders = [CODEC.decoder({}) for _ in range(2)]
    first, second = sequence(3), [-t for t in sequence(3)]
    for tensors in zip(first, second, strict=True):
        coded = [encoder.encode(tensor) for encoder, tensor in zip(encoders, tensors, strict=True)]
        for tensor, payload, decoder in zip(tensors, coded, decoders, strict=True):
            assert relative_error(tensor, decoder.decode(payload)) < 0.2
    with pytest.raises(CodecStateLost):
        decoders[0].decode(encoders[1].encode(second[0]))


@pytest.mark.parametrize("settings", [{}, {"tile": 2}, {"bits": 10, "strips": 2}], ids=str)
def test_no_frame_ends_in_another_tensors_packets(settings):
    """Each payload holds one picture for each of its frames, and any HEVC decoder that reads the packets of all
    tensors, one after the other, sees the pictures in that order."""
    tokens, channels = (1024, 1030) if "strips" in settings else (256, 64)
    tensors = sequence(3, tokens=tokens, channels=channels)
    encoder, decoder = CODEC.encoder(settings), CODEC.decoder(settings)
    geometry = Geometry.of(
        Grid(channels, tokens),
        bits=settings.get("bits", 8),
        tile=settings.get("tile", 0),
        strips=settings.get("strips", 1),
    )
    streams: list[bytearray] = [bytearray() for _ in range(geometry.strips)]
    decoded = []
    for tensor in tensors:
        coded = encoder.encode(tensor)
        sizes = np.frombuffer(coded.buffers[0], "<u4").reshape(geometry.strips, geometry.frames)
        place = 0
        for strip, row in enumerate(sizes):
            for frame, size in enumerate(row):
                unit = memoryview(coded.buffers[2])[place : place + size]
                check_unit(unit, geometry, key=coded.header["index"] == 0 and frame == 0)
                streams[strip] += unit
                place += size
        decoded.append(decoder.decode(coded))
    pictures = [
        np.array(
            [[plane_of(frame, k) for k in range(3)] for frame in av.open(io.BytesIO(s), format="hevc").decode(video=0)]
        )
        for s in streams
    ]
    assert [len(p) for p in pictures] == [len(tensors) * geometry.frames] * geometry.strips
    calibration = encoder._chain.calibration
    for number, back in enumerate(decoded):
        own = np.array([p[number * geometry.frames : (number + 1) * geometry.frames] for p in pictures])
        pixels = geometry.unpack(torch.from_numpy(own.astype(np.int16)))
        assert torch.equal(calibration.to_values(pixels, torch.bfloat16).t(), back)


def plane_of(frame: av.VideoFrame, number: int) -> np.ndarray:
    kind = np.uint16 if "10" in frame.format.name else np.uint8
    return np.frombuffer(frame.planes[number], kind).reshape(frame.height, -1)[:, : frame.width]


def test_sessions_stay_open():
    encoder, decoder = CODEC.encoder({}), CODEC.decoder({})
    tensors = sequence(3)
    decoder.decode(encoder.encode(tensors[0]))
    sessions = encoder._chain.sessions, decoder._chain.sessions
    encoder.reset()
    for tensor in tensors[1:]:
        decoder.decode(encoder.encode(tensor))
    assert (encoder._chain.sessions, decoder._chain.sessions) == sessions


@pytest.mark.parametrize(
    "settings",
    [
        {"qp": 52},
        {"qp": -1},
        {"qp": 1.0},
        {"qp": True},
        {"bits": 9},
        {"tile": 65},
        {"strips": 0},
        {"lossless": 1},
        {"x": 1},
    ],
    ids=str,
)
def test_settings_that_do_not_exist(settings):
    for opened in (CODEC.encoder, CODEC.decoder):
        with pytest.raises(CodecUnsupported):
            opened(settings)


def test_what_it_cannot_carry_is_said():
    for tensor in (torch.arange(5), torch.zeros(4, dtype=torch.float64), torch.zeros(2, dtype=torch.bool)):
        with pytest.raises(CodecUnsupported):
            CODEC.encoder({}).encode(tensor)


def test_quality_is_settings_and_lossless_is_another_codecs():
    peer = CODEC.capabilities()
    found = [CODEC.settings(quality, peer) for quality in ("transparent", "balanced", "fast")]
    assert found[0]["qp"] < found[1]["qp"] < found[2]["qp"]
    with pytest.raises(CodecUnsupported):
        CODEC.settings("lossless", peer)
    for other in ({}, {"formats": ["hevc-444-9"]}, {"formats": None}):
        with pytest.raises(CodecError):
            CODEC.settings("fast", other)
