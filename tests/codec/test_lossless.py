from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh_codec import DTYPES, CodecCorrupt, CodecError, CodecUnsupported, Encoded, LosslessCodec

from .structured import activations
from .test_raw import carry, random_tensor, same_bits

CODEC = LosslessCodec()
TENSOR = activations(400, 96)
CODED = CODEC.encoder({}).encode(TENSOR)
BUFFERS = [bytes(b) for b in CODED.buffers]


def there_and_back(tensor: torch.Tensor) -> tuple[Encoded, torch.Tensor]:
    coded = CODEC.encoder({}).encode(tensor)
    return coded, CODEC.decoder({}).decode(carry(coded), tensor.device)


@settings(max_examples=150, deadline=None)
@given(
    entry=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 7), max_size=5),
    seed=st.integers(0, 99),
    swap=st.booleans(),
)
def test_every_bit_arrives(entry, shape, seed, swap):
    tensor = random_tensor(entry.torch, shape, seed)
    tensor = tensor.transpose(0, -1) if swap and tensor.dim() > 1 else tensor
    _, back = there_and_back(tensor)
    assert same_bits(back, tensor) and back.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1 << 18, (1 << 18) + 1, (1 << 19) - 1])
def test_every_bit_of_several_pieces_arrives(dtype, count):
    assert same_bits(there_and_back(tensor := random_tensor(dtype, [count], 3))[1], tensor)


def test_what_is_not_finite_arrives_with_its_bits():
    bits = torch.tensor([0x7FC1, 0xFFFF, 0x7F80, 0xFF80, 0x0001, 0x8000], dtype=torch.int32).to(torch.int16)
    assert same_bits(there_and_back(bits.view(torch.bfloat16))[1], bits.view(torch.bfloat16))


def test_activations_shrink():
    tensor = activations(2048, 512)
    for dtype, least in ((torch.bfloat16, 1.4), (torch.float16, 1.35), (torch.float32, 2.7)):
        coded, _ = there_and_back(tensor.to(dtype))
        assert tensor.to(dtype).nbytes / coded.nbytes > least


def test_noise_hardly_grows():
    tensor = random_tensor(torch.float32, [1 << 18], 0)
    assert there_and_back(tensor)[0].nbytes < tensor.nbytes * 1.001


def test_same_input_same_bytes():
    assert CODEC.encoder({}).encode(TENSOR.clone()).buffers == CODED.buffers


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [400, 97]},
        {"shape": [401, 96]},
        {"shape": [0]},
        {"shape": [1 << 40, 1 << 40]},
        {"dtype": "float32"},
        {"dtype": "uint8"},
        {"dtype": None},
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_its_buffers(change):
    with pytest.raises(CodecCorrupt):
        CODEC.decoder({}).decode(Encoded(CODED.header | change, BUFFERS))


@pytest.mark.parametrize("place", range(2))
def test_a_buffer_that_is_short_long_empty_missing_or_another(place):
    whole = BUFFERS[place]
    decoder = CODEC.decoder({})
    for data in (whole[:-1], whole[: len(whole) // 2], whole + b"\0", b"", BUFFERS[1 - place]):
        with pytest.raises(CodecCorrupt):
            decoder.decode(Encoded(CODED.header, [data if i == place else b for i, b in enumerate(BUFFERS)]))
    with pytest.raises(CodecCorrupt):
        decoder.decode(Encoded(CODED.header, BUFFERS[:place] + BUFFERS[place + 1 :]))
    assert same_bits(decoder.decode(CODED), TENSOR)


def test_a_bool_that_is_neither():
    frame = zstandard.ZstdCompressor().compress(b"\x02\x01")
    with pytest.raises(CodecCorrupt, match="bool"):
        table = np.array([len(frame)], dtype="<u4").tobytes()
        CODEC.decoder({}).decode(Encoded({"dtype": "bool", "shape": [2]}, [table, frame]))


def test_a_small_payload_that_announces_a_large_tensor_allocates_nothing():
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    tracemalloc.start()
    try:
        for table in (b"", bytes(4 * 2 * 1024), bomb):
            with pytest.raises(CodecCorrupt):
                CODEC.decoder({}).decode(Encoded({"dtype": "bfloat16", "shape": [1 << 14, 1 << 14]}, [table, bomb]))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 1), flips=st.lists(st.tuples(st.integers(0), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_are_an_error(place, flips):
    data = bytearray(BUFFERS[place])
    for position, mask in flips:
        data[position % len(data)] ^= mask
    try:
        back = CODEC.decoder({}).decode(
            Encoded(CODED.header, [bytes(data) if i == place else b for i, b in enumerate(BUFFERS)])
        )
    except CodecError:
        return
    assert same_bits(back, TENSOR)


def test_settings_and_peers_that_do_not_fit():
    with pytest.raises(CodecUnsupported, match="cannot use the settings"):
        CODEC.encoder({"step": 1})
    with pytest.raises(CodecUnsupported, match="version"):
        CODEC.settings("lossless", {"formats": ["planes-zstd-9"]})
