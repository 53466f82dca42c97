"""Prediction from the tensor before: the loop is closed, both ends agree exactly, and nothing stale is ever used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh_codec import CodecCorrupt, CodecError, CodecStateLost, Encoded, EntropyCodec

from .structured import activations

CODEC = EntropyCodec()
STEP = {"step": 0.2}


def carried(coded: Encoded) -> Encoded:
    return Encoded(dict(coded.header), [memoryview(bytes(b)) for b in coded.buffers])


def drifting(steps: int, change: float = 0.06, tokens: int = 256, channels: int = 64) -> list[torch.Tensor]:
    """bfloat16 tensors, each ``change`` of its deviation from the one before."""
    first = activations(tokens, channels, dtype=torch.float32)
    noise = [activations(tokens, channels, seed=10 + i, dtype=torch.float32) for i in range(steps)]
    made = [first]
    for fresh in noise[1:]:
        made.append(made[-1] + change * (fresh - fresh.mean(0)))
    return [tensor.bfloat16() for tensor in made]


def within_half_a_step(tensor: torch.Tensor, back: torch.Tensor, step: float) -> bool:
    exact, got = tensor.double(), back.double()
    # Numbers next to zero are further apart than the type's precision says.
    kind = torch.finfo(tensor.dtype)
    slack = exact.abs() * (kind.eps + 2**-22) + step * 2**-8 + kind.tiny * kind.eps
    return bool(((exact - got).abs() <= step / 2 * (1 + torch.finfo(tensor.dtype).eps) + slack).all())


def test_a_tensor_that_changed_little_costs_little_and_errs_no_more():
    encoder, decoder = CODEC.encoder(STEP), CODEC.decoder(STEP)
    sizes = []
    for tensor in drifting(12):
        coded = encoder.encode(tensor)
        assert within_half_a_step(tensor, decoder.decode(carried(coded)), coded.header["step"])
        sizes.append(coded.nbytes)
    assert max(sizes[1:]) < 0.45 * sizes[0]


def test_what_has_nothing_in_common_costs_no_more_than_a_key_frame():
    encoder = CODEC.encoder(STEP)
    tensors = [activations(256, 64, seed=i) for i in range(4)]
    alone = [CODEC.encoder(STEP).encode(tensor).nbytes for tensor in tensors]
    for tensor, size in zip(tensors, alone, strict=True):
        assert encoder.encode(tensor).nbytes <= size * 1.02


def test_without_prediction_every_tensor_stands_for_itself():
    encoder, decoder = (make({"step": 0.2, "temporal": False}) for make in (CODEC.encoder, CODEC.decoder))
    first, second = drifting(2)
    coded = [encoder.encode(tensor) for tensor in (first, second, first)]
    assert coded[0].header == coded[2].header and coded[0].buffers == coded[2].buffers
    backs = [decoder.decode(carried(coded[i])) for i in (1, 0, 0)]
    assert torch.equal(backs[1], backs[2])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_both_ends_hold_the_same_whole_numbers(data):
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    seed = data.draw(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    shape = data.draw(st.sampled_from([(70, 5), (3, 64, 4), (2, 3), (500,), ()]))
    encoder, decoder = CODEC.encoder(STEP), CODEC.decoder(STEP)
    largest = torch.finfo(dtype).max
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    for _ in range(data.draw(st.integers(2, 6))):
        change = data.draw(st.sampled_from([0.0, 1e-3, 0.05, 1.0, 30.0]))
        scale = data.draw(st.sampled_from([1.0, 1.0, 1.0, 0.5, 3.0, 1e-4, 1e4, 0.0]))
        values = (values + change * torch.randn(shape, generator=generator, dtype=torch.float64)) * scale
        tensor = values.clamp(-largest, largest).to(dtype)
        if data.draw(st.booleans()) and tensor.numel():
            odd = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf, largest]))
            tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = odd
        if data.draw(st.integers(0, 9)) == 0:
            encoder.reset()
        coded = encoder.encode(tensor)
        back = decoder.decode(carried(coded))
        finite = tensor.isfinite()
        assert torch.equal(back.isfinite(), finite)
        assert within_half_a_step(tensor[finite], back[finite], coded.header["step"])
        here, there = encoder._reference, decoder._reference
        assert here.digest == there.digest and here.step == there.step
        assert np.array_equal(here.symbols, there.symbols) and np.array_equal(here.order, there.order)


def test_an_outlier_that_stays_and_goes_leaves_both_ends_equal():
    encoder, decoder = CODEC.encoder(STEP), CODEC.decoder(STEP)
    for i, tensor in enumerate(drifting(6)):
        if i in (1, 2, 4):
            tensor[3, 5], tensor[100, :] = torch.inf, 3e38
        coded = encoder.encode(tensor)
        back = decoder.decode(carried(coded))
        finite = tensor.isfinite()
        assert torch.equal(back.isfinite(), finite)
        assert within_half_a_step(tensor[finite], back[finite], coded.header["step"])


def test_a_step_that_no_longer_fits_is_followed():
    encoder, decoder = CODEC.encoder(STEP), CODEC.decoder(STEP)
    tensor = activations(256, 64, dtype=torch.float32)
    asked = []
    for gain in (1.0, 1.1, 1.5, 3.0, 1.0, 0.2):
        coded = encoder.encode(tensor * gain)
        alone = CODEC.encoder(STEP).encode(tensor * gain).header["step"]
        asked.append(coded.header["step"] / alone)
        assert within_half_a_step(tensor * gain, decoder.decode(carried(coded)), coded.header["step"])
    assert all(1 / 1.21 <= ratio <= 1.21 for ratio in asked)


@pytest.mark.parametrize(
    "other", [torch.zeros(256, 65), torch.zeros(256, 64).half(), torch.zeros(0, 64), torch.ones(9)]
)
def test_another_form_is_a_key_frame_and_so_is_what_follows(other):
    encoder, decoder = CODEC.encoder(STEP), CODEC.decoder(STEP)
    first, second = drifting(2)
    for tensor in (first, other + torch.rand(other.shape), second):
        coded = encoder.encode(tensor)
        assert coded.header["reference"] == b""
        assert decoder.decode(carried(coded)).shape == tensor.shape


def test_after_a_reset_comes_a_key_frame():
    encoder, decoder = CODEC.encoder(STEP), CODEC.decoder(STEP)
    first, second, third = drifting(3)
    decoder.decode(carried(encoder.encode(first)))
    encoder.reset()
    coded = encoder.encode(second)
    assert coded.header["reference"] == b""
    assert within_half_a_step(second, decoder.decode(carried(coded)), coded.header["step"])
    decoder.reset()
    with pytest.raises(CodecStateLost, match="key frame"):
        decoder.decode(carried(encoder.encode(third)))


def test_frames_that_are_lost_swapped_or_replayed_are_not_used():
    coded = [carried(c) for c in map(CODEC.encoder(STEP).encode, drifting(4))]
    expected = [d for decoder in [CODEC.decoder(STEP)] for d in map(decoder.decode, coded)]
    for order in ((1,), (0, 2), (0, 0), (0, 1, 1), (0, 1, 0), (0, 1, 3), (0, 1, 2, 1)):
        decoder = CODEC.decoder(STEP)
        for i in order[:-1]:
            decoder.decode(coded[i])
        with pytest.raises(CodecStateLost):
            decoder.decode(coded[order[-1]])
        following = order[-2] + 1 if len(order) > 1 else 0
        assert torch.equal(decoder.decode(coded[following]), expected[following]), "the next tensor is unharmed"


def test_another_streams_frame_of_the_same_number_is_not_used():
    one, other = drifting(3), drifting(3, change=0.09)
    mine, foreign = (list(map(CODEC.encoder(STEP).encode, tensors)) for tensors in (one, other))
    decoder = CODEC.decoder(STEP)
    for coded in mine[:2]:
        decoder.decode(carried(coded))
    with pytest.raises(CodecStateLost):
        decoder.decode(carried(foreign[2]))


def test_two_runs_give_the_same_bytes():
    tensors = drifting(4)
    first, second = ([c.buffers for c in map(EntropyCodec().encoder(STEP).encode, tensors)] for _ in range(2))
    assert first == second


FRAMES = [carried(c) for c in map(CODEC.encoder(STEP).encode, drifting(3, tokens=128, channels=48))]


def decoded_one() -> tuple[object, list[torch.Tensor]]:
    decoder = CODEC.decoder(STEP)
    return decoder, [decoder.decode(FRAMES[0])]


@pytest.mark.parametrize(
    "change",
    [
        {"reference": b"12345678"},
        {"reference": b""},
        {"reference": b"1234"},
        {"reference": None},
        {"frame": 0},
        {"frame": -1},
        {"frame": True},
        {"frame": 1 << 70},
        {"step": 0.0},
        {"step": 1e9},
        {"shape": [48, 128]},
        {"dtype": "float16"},
        {"outliers": 1},
    ],
    ids=str,
)
def test_a_predicted_frame_whose_header_lies(change):
    decoder, _ = decoded_one()
    with pytest.raises(CodecError):
        decoder.decode(Encoded(FRAMES[1].header | change, FRAMES[1].buffers))
    assert decoder.decode(FRAMES[1]).shape == (128, 48)


@settings(max_examples=300, deadline=None)
@given(place=st.sampled_from([0, 2]), position=st.integers(0), mask=st.integers(1, 255))
def test_flipped_bytes_never_make_a_wrong_tensor_later(place, position, mask):
    """A damaged frame that still decodes is known by its digest when the next one refers to it."""
    decoder, _ = decoded_one()
    data = bytearray(FRAMES[1].buffers[place])
    data[position % len(data)] ^= mask
    buffers = [bytes(data) if i == place else b for i, b in enumerate(FRAMES[1].buffers)]
    with pytest.raises(CodecError):
        decoder.decode(Encoded(FRAMES[1].header, buffers))
        decoder.decode(FRAMES[2])


def test_changes_that_lead_out_of_range_are_refused():
    tensor = torch.linspace(-1, 1, 128 * 4).reshape(128, 4)
    huge = {"step": 1e-3}
    encoder, decoder = CODEC.encoder(huge), CODEC.decoder(huge)
    decoder.decode(carried(encoder.encode(tensor)))
    coded = encoder.encode(tensor + 1e-4)
    assert coded.header["reference"]
    decoder._reference.symbols[...] = 32767
    decoder._reference.symbols[0, 0] = -32767
    with pytest.raises(CodecCorrupt, match="none of"):
        decoder.decode(carried(encoder_of_ones(coded, decoder)))


def encoder_of_ones(coded: Encoded, decoder: object) -> Encoded:
    """A payload by hand whose changes are all 1."""
    from mesh_codec.pieces import pack, table

    piece = pack(np.ones(128 * 4, dtype=np.int16), 1, predicted=True)
    return Encoded(dict(coded.header), [table([piece]), b"", b"".join(piece.frames), b""])
