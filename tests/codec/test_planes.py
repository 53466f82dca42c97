"""The device engine of the lossless codec on CPU tensors, with a stand-in for the coder of the GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh_codec import DTYPES, CodecCorrupt, CodecError, CodecUnsupported, Encoded, LosslessCodec
from mesh_codec.ans import planes

from .emulated_ans import EmulatedAns
from .structured import activations
from .test_raw import carry, random_tensor, same_bits

CODEC = LosslessCodec(EmulatedAns())
CHOSEN = {"format": f"planes-{EmulatedAns.format}"}
CODED = CODEC.encoder(CHOSEN).encode(activations(400, 96))
BUFFERS = [bytes(b) for b in CODED.buffers]


def there_and_back(tensor: torch.Tensor) -> tuple[Encoded, torch.Tensor]:
    coded = CODEC.encoder(CHOSEN).encode(tensor)
    return coded, CODEC.decoder(CHOSEN).decode(carry(coded), tensor.device)


@settings(max_examples=150, deadline=None)
@given(
    entry=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 7), max_size=5),
    seed=st.integers(0, 99),
    swap=st.booleans(),
)
def test_every_bit_of_every_type_arrives(entry, shape, seed, swap):
    tensor = random_tensor(entry.torch, shape, seed)
    tensor = tensor.transpose(0, -1) if swap and tensor.dim() > 1 else tensor
    coded, back = there_and_back(tensor)
    assert same_bits(back, tensor) and back.is_contiguous()
    assert ("high" in coded.header) == (entry.torch in (torch.bfloat16, torch.float16) and tensor.numel() > 0)


def test_one_element_of_odd_strides_arrives():
    tensor = torch.full((1, 5, 1), 1.5, dtype=torch.bfloat16).transpose(0, -1)[:, :1]
    assert tensor.is_contiguous() and tensor.stride(-1) == 5
    assert there_and_back(tensor)[1].item() == 1.5
    portable = LosslessCodec()
    assert portable.decoder({}).decode(portable.encoder({}).encode(tensor)).item() == 1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_there_is_arrives_with_its_bits(dtype):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).repeat(5).view(dtype)
    assert same_bits(there_and_back(every)[1], every)


def test_a_bfloat16_shrinks_as_on_the_processor():
    tensor = activations(2048, 512)
    portable = LosslessCodec().encoder({}).encode(tensor)
    coded, _ = there_and_back(tensor)
    assert tensor.nbytes / coded.nbytes > 1.4 and coded.nbytes < 1.03 * portable.nbytes


def test_same_input_same_bytes():
    again = CODEC.encoder(CHOSEN).encode(activations(400, 96))
    assert [bytes(b) for b in again.buffers] == BUFFERS and again.header == CODED.header


@pytest.mark.parametrize(
    "change",
    [{"shape": [400, 97]}, {"shape": [1 << 15, 1 << 14]}, {"shape": [0]}, {"dtype": "float32"}, {"dtype": "int16"},
     {"high": 5}, {"low": 5}, {"high": None}, {"low": -1}, {"low": True}],
    ids=str,
)  # fmt: skip
def test_a_header_that_does_not_fit_its_buffers(change):
    with pytest.raises(CodecCorrupt):
        CODEC.decoder(CHOSEN).decode(Encoded(CODED.header | change, BUFFERS))


@pytest.mark.parametrize("buffers", [[], BUFFERS[:1], [*BUFFERS, b""], BUFFERS[::-1], [b"", BUFFERS[1]]])
def test_buffers_that_are_missing_or_others(buffers):
    with pytest.raises(CodecCorrupt):
        CODEC.decoder(CHOSEN).decode(Encoded(CODED.header, buffers))


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 1), position=st.integers(0), mask=st.integers(1, 255), cut=st.booleans())
def test_damage_is_an_error(place, position, mask, cut):
    data = bytearray(BUFFERS[place])
    data[position % len(data)] ^= mask
    buffers = [data[: len(data) - cut] if i == place else b for i, b in enumerate(BUFFERS)]
    try:
        back = CODEC.decoder(CHOSEN).decode(Encoded(CODED.header, buffers))
    except CodecError:
        return
    # Only what fills chunks up is covered by no sum.
    assert place == 0 and same_bits(back, activations(400, 96))


def test_the_device_is_chosen_where_both_ends_have_it():
    fast, portable = LosslessCodec(EmulatedAns()), LosslessCodec(EmulatedAns(works=False))
    tensor = activations(64, 32)
    for one, other, chosen in ((fast, fast, CHOSEN), (fast, portable, {}), (portable, fast, {})):
        agreed = one.settings("lossless", other.capabilities())
        assert agreed == chosen == other.settings("lossless", one.capabilities())
        assert one.estimate(agreed, tensor.dtype).engine == ("emulated" if chosen else "")
        assert same_bits(other.decoder(agreed).decode(one.encoder(agreed).encode(tensor)), tensor)
    with pytest.raises(CodecUnsupported, match="cannot code"):
        portable.encoder(CHOSEN)


@pytest.mark.parametrize("wrong", ["other bits", "an error"])
def test_a_gpu_that_gives_other_bits_is_not_offered(monkeypatch, wrong):
    if wrong == "other bits":
        monkeypatch.setattr(planes, "_bytes", lambda tensor: tensor.view(torch.uint8).view(-1, 2).flip(1))
    else:
        monkeypatch.setattr(planes, "checksum", lambda data, total=None: 1 // 0)
    assert len(LosslessCodec(EmulatedAns()).capabilities()["formats"]) == 1
