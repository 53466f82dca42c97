from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh_codec import DTYPES, CodecCorrupt, CodecUnsupported, DecodeLimits, Encoded, RawCodec

CODEC = RawCodec()
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def random_tensor(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    size = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return data.view(dtype).reshape(shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # Memory of its own: one element may have any stride, over which torch sees no bytes.
    flat = [torch.empty(t.numel(), dtype=t.dtype).copy_(t.cpu().reshape(-1)) for t in (a, b)]
    return not a.numel() or torch.equal(*(t.view(torch.uint8) for t in flat))


def carry(coded: Encoded) -> Encoded:
    """As it comes out of a socket: read-only memory."""
    return Encoded(dict(coded.header), [memoryview(bytes(b)) for b in coded.buffers])


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=150, deadline=None)
@given(
    entry=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 7), max_size=5),
    seed=st.integers(0, 99),
    swap=st.booleans(),
)
def test_every_bit_arrives(device, entry, shape, seed, swap):
    tensor = random_tensor(entry.torch, shape, seed).to(device)
    tensor = tensor.transpose(0, -1) if swap and tensor.dim() > 1 else tensor
    coded = CODEC.encoder({}).encode(tensor)
    assert coded.nbytes == tensor.numel() * entry.itemsize
    back = CODEC.decoder({}).decode(carry(coded), device)
    assert back.device.type == device
    assert same_bits(back, tensor)


def test_strided_expanded_conjugated_and_gradient_tensors_arrive():
    base = torch.arange(60.0).reshape(3, 4, 5)
    complex_base = torch.complex(base, -base)
    for tensor in (base[:, ::2, 1:4], base[0, 0, 0].expand(6), base.clone().requires_grad_(), complex_base.conj()):
        back = CODEC.decoder({}).decode(carry(CODEC.encoder({}).encode(tensor)))
        assert torch.equal(back, tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool])
def test_contiguous_tensors_are_not_copied_at_either_end(dtype):
    tensor = torch.zeros(64, 64).to(dtype)
    coded = CODEC.encoder({}).encode(tensor)
    assert CODEC.decoder({}).decode(coded).data_ptr() == tensor.data_ptr()


def test_decoded_memory_outlives_the_message():
    tensor = torch.randn(1 << 18)
    back = CODEC.decoder({}).decode(carry(CODEC.encoder({}).encode(tensor)))
    filler = [bytes(1 << 20) for _ in range(8)]
    assert torch.equal(back, tensor) and filler


def test_read_only_memory_is_no_warning():
    coded = carry(CODEC.encoder({}).encode(torch.ones(8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CODEC.decoder({}).decode(coded).sum() == 8


def test_misaligned_memory():
    tensor = torch.randn(100, dtype=torch.float64)
    coded = CODEC.encoder({}).encode(tensor)
    shifted = memoryview(b"x" + bytes(coded.buffers[0]))[1:]
    assert torch.equal(CODEC.decoder({}).decode(Encoded(coded.header, [shifted])), tensor)


GOOD = {"dtype": "float32", "shape": [2, 3]}


@pytest.mark.parametrize(
    ("header", "buffers"),
    [
        (GOOD, []),
        (GOOD, [bytes(24), b""]),
        (GOOD, [bytes(23)]),
        (GOOD, [bytes(25)]),
        (GOOD, [b""]),
        (GOOD, ["text"]),
        (GOOD | {"shape": [0, 3]}, [b""]),
        (GOOD | {"shape": [-2, -3]}, [bytes(24)]),
        (GOOD | {"shape": [2.0, 3]}, [bytes(24)]),
        (GOOD | {"shape": [True, 6]}, [bytes(24)]),
        (GOOD | {"shape": 6}, [bytes(24)]),
        (GOOD | {"shape": None}, [bytes(24)]),
        (GOOD | {"shape": [1] * 9}, [bytes(4)]),
        (GOOD | {"shape": [1 << 62, 1 << 62]}, [bytes(24)]),
        (GOOD | {"shape": [1 << 32, 1 << 32]}, [b""]),
        (GOOD | {"shape": [1 << 62, 0]}, []),
        (GOOD | {"shape": [10**400]}, [b""]),
        (GOOD | {"dtype": "float31"}, [bytes(24)]),
        (GOOD | {"dtype": 4}, [bytes(24)]),
        (GOOD | {"dtype": ["float32"]}, [bytes(24)]),
        ({"shape": [2, 3]}, [bytes(24)]),
        ({"dtype": "float32"}, [bytes(24)]),
        ([], [bytes(24)]),
        ({"dtype": "bool", "shape": [2]}, [b"\x01\x02"]),
    ],
)
def test_a_lying_payload_is_refused_and_the_next_is_read(header, buffers):
    decoder = CODEC.decoder({})
    with pytest.raises(CodecCorrupt):
        decoder.decode(Encoded(header, buffers))
    assert decoder.decode(Encoded(GOOD, [bytes(24)])).shape == (2, 3)


def test_limits_hold():
    coded = CODEC.encoder({}).encode(torch.zeros(10))
    with pytest.raises(CodecCorrupt, match="limit of 9 elements"):
        CODEC.decoder({}, DecodeLimits(max_elements=9)).decode(coded)
    with pytest.raises(CodecCorrupt, match="39 bytes"):
        CODEC.decoder({}, DecodeLimits(max_bytes=39)).decode(coded)


def test_what_has_no_bytes_to_send_is_refused():
    for tensor in (torch.zeros(2, device="meta"), torch.eye(2).to_sparse()):
        with pytest.raises(CodecUnsupported):
            CODEC.encoder({}).encode(tensor)
    with pytest.raises(CodecUnsupported, match="no settings"):
        CODEC.encoder({"step": 1})
