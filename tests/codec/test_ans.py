"""The device engine of the entropy codec on CPU tensors, with a stand-in for the coder of the GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh_codec import (
    CodecCorrupt,
    CodecError,
    CodecStateLost,
    CodecUnsupported,
    DecodeLimits,
    Encoded,
    EntropyCodec,
    LosslessCodec,
)
from mesh_codec.ans.dispatch import checksum
from mesh_codec.ans.findings import DeviceFindings
from mesh_codec.ans.lattice import Lattice, measure
from mesh_codec.ans.stream import AnsDecoder, AnsEncoder

from .emulated_ans import EmulatedAns
from .structured import activations
from .test_hevc import relative_error, sequence

CPU = torch.device("cpu")


def encoder(step: float = 0.2, *, temporal: bool = True) -> AnsEncoder:
    return AnsEncoder(step, temporal, EmulatedAns())


def decoder(limits: DecodeLimits = DecodeLimits()) -> AnsDecoder:  # noqa: B008
    return AnsDecoder(limits, EmulatedAns())


def test_error_and_rate_are_those_of_the_portable_engine():
    tensor = activations(512, 96)
    portable = EntropyCodec()
    for step in (0.1, 0.2, 0.36):
        own, other = encoder(step).encode(tensor), portable.encoder({"step": step}).encode(tensor)
        back = decoder().decode(own)
        error = relative_error(tensor, portable.decoder({"step": step}).decode(other))
        assert relative_error(tensor, back) == pytest.approx(error, rel=0.05)
        assert own.nbytes < 1.15 * other.nbytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "shape", [(), (0,), (3, 0, 5), (1,), (7,), (1, 1, 129), (3, 67, 5), (2, 33, 31), (65, 1)], ids=str
)
def test_any_shape(shape, dtype):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    back = decoder().decode(encoder(0.05).encode(tensor))
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert tensor.numel() == 0 or (back.float() - tensor.float()).abs().max() < 0.1


def test_what_is_not_finite_or_out_of_range_crosses_exactly():
    tensor = activations(256, 64, dtype=torch.float32)
    tensor[3, 4], tensor[5, 6], tensor[7, 8], tensor[9, 10] = torch.nan, torch.inf, -torch.inf, 1e30
    tensor[100] *= 1000
    coded = encoder().encode(tensor)
    back = decoder().decode(coded)
    assert back[3, 4].isnan() and back[5, 6] == torch.inf and back[7, 8] == -torch.inf and back[9, 10] == 1e30
    assert ((back[100] - tensor[100]).abs() < tensor.std(0).nan_to_num(0, 0, 0).median()).all()


@pytest.mark.parametrize("value", [0.0, 1 / 3, -7e4, torch.inf, torch.nan])
def test_what_does_not_vary_is_exact(value):
    tensor = torch.full((128, 24), value)
    back = decoder().decode(encoder().encode(tensor))
    assert torch.equal(tensor.view(torch.int32), back.view(torch.int32))


def test_strides_do_not_matter_and_the_same_tensors_give_the_same_bytes():
    tensor = activations(96, 80)
    padded = torch.zeros(96, 160, dtype=tensor.dtype)
    padded[:, ::2] = tensor
    coded = [
        [bytes(b) for b in encoder().encode(t).buffers] for t in (tensor, tensor.t().contiguous().t(), padded[:, ::2])
    ]
    assert coded[0] == coded[1] == coded[2]


def test_a_change_costs_less_than_a_tensor_and_errors_do_not_add_up():
    sender, receiver = encoder(0.1), decoder()
    tensors = sequence(12)
    coded = [sender.encode(tensor) for tensor in tensors]
    assert max(c.nbytes for c in coded[1:]) < 0.5 * coded[0].nbytes
    errors = [relative_error(t, receiver.decode(c)) for t, c in zip(tensors, coded, strict=True)]
    assert max(errors) < 1.05 * errors[0]


def test_channels_that_changed_wholly_are_not_predicted():
    first = activations(256, 64)
    second = torch.cat([first[:, :32], activations(256, 64, seed=1)[:, 32:]], dim=1)
    sender, receiver = encoder(0.1), decoder()
    receiver.decode(sender.encode(first))
    coded = sender.encode(second)
    chosen = np.unpackbits(np.frombuffer(coded.buffers[1], np.uint8))
    assert chosen[:32].all() and chosen[32:].mean() < 0.5
    assert relative_error(second, receiver.decode(coded)) < 0.05


def test_a_reset_another_shape_and_another_scale_make_a_key():
    sender, receiver = encoder(), decoder()
    first, second = sequence(2)
    for tensor, index in ((first, 0), (second, 1), (second * 4, 0), (second[:128], 0), (second[:128], 1)):
        coded = sender.encode(tensor)
        assert coded.header["index"] == index
        assert relative_error(tensor, receiver.decode(coded)) < 0.1
    sender.reset()
    assert sender.encode(second[:128]).header["index"] == 0
    alone = encoder(temporal=False)
    assert [alone.encode(tensor).header["index"] for tensor in (first, second)] == [0, 0]


def test_a_lost_reference_is_named_and_nothing_is_harmed():
    sender, receiver = encoder(), decoder()
    tensors = sequence(4)
    coded = [sender.encode(tensor) for tensor in tensors]
    with pytest.raises(CodecStateLost):
        decoder().decode(coded[1])
    receiver.decode(coded[0])
    with pytest.raises(CodecStateLost):
        receiver.decode(coded[2])
    receiver.decode(coded[1])
    with pytest.raises(CodecStateLost):
        receiver.decode(coded[1])
    assert relative_error(tensors[2], receiver.decode(coded[2])) < 0.1


def test_after_a_failed_coder_the_next_tensor_is_a_key():
    factory = EmulatedAns()
    sender = AnsEncoder(0.2, True, factory)
    tensors = sequence(3)
    sender.encode(tensors[0])
    factory.failing = "chunk"
    with pytest.raises(CodecUnsupported):
        sender.encode(tensors[1])
    factory.failing = ""
    coded = sender.encode(tensors[2])
    assert coded.header["index"] == 0
    assert relative_error(tensors[2], decoder().decode(coded)) < 0.1


SENDER = encoder()
KEY, NEXT = (SENDER.encode(tensor) for tensor in sequence(2, tokens=96, channels=24))


@pytest.mark.parametrize(
    "change",
    [{"shape": [96, 25]}, {"shape": [1 << 40, 1 << 40]}, {"shape": [0]}, {"dtype": "int32"}, {"step": -1.0},
     {"step": 1}, {"outliers": 9}, {"sum": 5}, {"sum": None}, {"chain": -1}, {"index": None}, {"index": True}],
    ids=str,
)  # fmt: skip
def test_a_header_that_does_not_fit_its_buffers(change):
    receiver = decoder()
    with pytest.raises(CodecCorrupt):
        receiver.decode(Encoded(KEY.header | change, KEY.buffers))
    assert receiver.decode(KEY).shape == (96, 24)


@settings(max_examples=300, deadline=None)
@given(
    place=st.integers(0, 3),
    position=st.integers(0),
    mask=st.integers(1, 255),
    cut=st.booleans(),
    predicted=st.booleans(),
)
def test_damage_is_an_error_and_the_next_tensor_is_unharmed(place, position, mask, cut, predicted):
    coded, receiver = NEXT if predicted else KEY, decoder()
    receiver.decode(KEY)
    data = bytearray(bytes(coded.buffers[place]))
    if data:
        data[position % len(data)] ^= mask
    if cut or not data:
        data = data[:-1] if data else bytearray(b"x")
    buffers = [data if i == place else b for i, b in enumerate(coded.buffers)]
    try:
        back = receiver.decode(Encoded(coded.header, buffers))
    except CodecError:
        assert relative_error(sequence(1, tokens=96, channels=24)[0], receiver.decode(KEY)) < 0.1
        return
    # What no checksum covers: which channels are predicted, and what chunks are filled up with.
    assert place in (1, 2) and back.shape == (96, 24)
    if place == 2:
        intact = decoder()
        assert torch.equal(back, [intact.decode(c) for c in (KEY, NEXT)][predicted])


def test_the_checksum_sees_every_byte_and_the_order():
    random = np.random.default_rng(0)
    for size in (1, 5, 4096, 4097, 70_000):
        data = torch.from_numpy(random.integers(0, 255, size, dtype=np.uint8))
        seen = int(checksum(data))
        for _ in range(30):
            changed = data.clone()
            changed[random.integers(size)] += 1
            assert int(checksum(changed)) != seen
        if size > 2:
            a, b = 0, size - 1
            swapped = data.clone()
            swapped[a], swapped[b] = int(data[b]), int(data[a])
            assert (int(checksum(swapped)) == seen) == bool(data[a] == data[b])


@settings(max_examples=100, deadline=None)
@given(tokens=st.integers(64, 200), channels=st.integers(1, 40), seed=st.integers(0, 100))
def test_both_ends_keep_the_same_lattice(tokens, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(tokens, channels, generator=generator) * torch.logspace(-2, 3, channels)
    first[0, 0] = torch.nan
    second = first + 0.3 * torch.randn(tokens, channels, generator=generator)
    findings = DeviceFindings(channels, tokens * channels, CPU)
    measure(first, 0.2, findings)
    lattice = Lattice.of(findings.ranks, findings.means, findings.step)
    own, other = lattice.empty(tokens), lattice.empty(tokens)
    for tensor in (first, second):
        symbols = lattice.quantise(tensor, own, findings)
        back = lattice.restore(symbols, other, findings.predicted, torch.float32)
        assert torch.equal(own, other)
        listed = findings.listed[: int(findings.count)]
        exact = torch.zeros(tokens * channels, dtype=torch.bool)
        exact[listed >> 32] = True
        error = (back - tensor).abs() / lattice.scales.clamp_min(1e-30)
        assert (error.view(-1)[~exact] <= 0.501).all()
        assert set(lattice.outside(tensor, own).tolist()) <= set(listed.tolist())
        findings = DeviceFindings(channels, tokens * channels, CPU)
        findings.predicted[:] = torch.arange(channels) % 2 == 0


def test_more_outliers_than_are_listed_cross_exactly_too():
    tensor = activations(4096, 64, dtype=torch.float32)
    tensor[:40] = torch.nan
    assert max(1024, tensor.numel() // 256) < 40 * 64
    back = decoder().decode(encoder().encode(tensor))
    assert back[:40].isnan().all() and not back[40:].isnan().any()


def test_the_entropy_codec_takes_the_device_format_where_both_ends_have_it():
    fast, portable = EntropyCodec(EmulatedAns()), EntropyCodec(EmulatedAns(works=False))
    format_ = f"step-{EmulatedAns.format}"
    assert fast.capabilities()["formats"] == [format_, *portable.capabilities()["formats"]]
    tensor = sequence(1)[0]
    for one, other, device in ((fast, fast, True), (fast, portable, False), (portable, fast, False)):
        agreed = one.settings("fast", other.capabilities())
        assert (agreed.get("format") == format_) is device
        assert agreed == other.settings("fast", one.capabilities())
        assert (one.estimate(agreed, tensor.dtype).engine == "emulated") is device
        sender, receiver = one.encoder(agreed), other.decoder(agreed)
        assert isinstance(sender, AnsEncoder) is device
        assert relative_error(tensor, receiver.decode(sender.encode(tensor))) < 0.2
    with pytest.raises(CodecUnsupported, match="cannot code"):
        portable.encoder({"step": 0.2, "format": format_})
    with pytest.raises(CodecUnsupported):
        fast.encoder({"step": 0.2, "format": "step-ans-9"})


def test_a_gpu_that_cannot_be_used_is_said_to_people():
    (found,) = EntropyCodec(EmulatedAns(works=False)).remedies()
    assert "no kernels" in found[0] and "[cuda]" in found[1]
    assert not EntropyCodec(EmulatedAns()).remedies() and not LosslessCodec().remedies()


def test_an_amd_gpu_is_not_told_to_install_nvidias_library(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not EntropyCodec().remedies() and len(EntropyCodec().capabilities()["formats"]) == 1


def test_without_a_gpu_nvcomp_is_not_offered():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert all("ans" not in name for name in EntropyCodec().capabilities()["formats"])
