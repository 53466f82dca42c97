from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh_codec import CodecUnsupported, Encoded, EntropyCodec

from .structured import activations

CODEC = EntropyCodec()
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def there_and_back(tensor: torch.Tensor, step: float = 0.2) -> tuple[Encoded, torch.Tensor]:
    coded = CODEC.encoder({"step": step}).encode(tensor)
    carried = Encoded(dict(coded.header), [memoryview(bytes(b)) for b in coded.buffers])
    back = CODEC.decoder({"step": step}).decode(carried, tensor.device)
    assert (back.dtype, back.shape, back.device) == (tensor.dtype, tensor.shape, tensor.device)
    assert back.is_contiguous()
    return coded, back


def assert_within_half_a_step(tensor: torch.Tensor, back: torch.Tensor, step: float) -> None:
    """|x - x'| <= step / 2, beside the rounding of the result to its type and of the float32 arithmetic."""
    exact, got = tensor.double(), back.double()
    info = torch.finfo(tensor.dtype)
    slack = exact.abs().clamp_min(info.smallest_normal) * (info.eps + 2**-22) + step * 2**-8
    assert bool(((exact - got).abs() <= step / 2 * (1 + info.eps) + slack).all())


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from(FLOATS),
    shape=st.lists(st.integers(0, 9), max_size=3),
    tokens=st.sampled_from([1, 2, 64, 131]),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 300.0, 1e30]),
    step=st.floats(0.01, 2.0),
    seed=st.integers(0, 99),
)
def test_any_shape_stays_within_half_a_step(device, dtype, shape, tokens, scale, step, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn([tokens, *shape], generator=generator) * scale
    tensor = values.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).to(device)
    coded, back = there_and_back(tensor, step)
    assert_within_half_a_step(tensor, back, coded.header["step"])


@pytest.mark.parametrize(
    "shape", [(), (1,), (0,), (3, 0), (0, 5), (1, 1, 4096), (100_000,), (600_000, 1), (2, 700, 96)]
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_shapes_at_the_edges(shape, dtype):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    coded, back = there_and_back(tensor)
    assert_within_half_a_step(tensor, back, coded.header["step"])


def test_a_transposed_view_gives_the_bytes_of_its_copy():
    tensor = activations(128, 256).t()
    coded, _ = there_and_back(tensor)
    assert coded.buffers == there_and_back(tensor.contiguous())[0].buffers


def test_same_input_same_bytes():
    tensor = activations(700, 640)
    first, second = (EntropyCodec().encoder({"step": 0.1}).encode(tensor.clone()) for _ in range(2))
    assert first.header == second.header and list(first.buffers) == list(second.buffers)


@pytest.mark.parametrize("step", [0.05, 0.1, 0.2, 0.36, 1.0, 2.0])
def test_the_rate_is_that_of_the_symbols_entropy(step):
    tensor = activations(2048, 512)
    coded, _ = there_and_back(tensor, step)
    exact = tensor.double()
    symbols = ((exact - exact.mean(0)) / coded.header["step"]).round().long().numpy()
    counts = np.unique(symbols, return_counts=True)[1] / symbols.size
    entropy = -(counts * np.log2(counts)).sum()
    assert coded.nbytes * 8 / tensor.numel() <= entropy + 0.25


def test_channels_of_unlike_deviation_cost_less_than_one_table_for_all():
    generator = torch.Generator().manual_seed(0)
    gains = torch.logspace(-1.5, 0.5, 256)[torch.randperm(256, generator=generator)]
    tensor = torch.randn(4096, 256, generator=generator) * gains
    coded, _ = there_and_back(tensor, 0.2)
    symbols = ((tensor - tensor.mean(0)) / coded.header["step"]).round().long().numpy()
    counts = np.unique(symbols, return_counts=True)[1] / symbols.size
    assert coded.nbytes * 8 / tensor.numel() < -(counts * np.log2(counts)).sum() - 0.2


def test_coarser_steps_take_fewer_bytes_and_err_more():
    tensor = activations(1024, 512)
    results = [there_and_back(tensor, step) for step in (0.05, 0.1, 0.2, 0.36, 0.7, 1.5)]
    sizes = [coded.nbytes for coded, _ in results]
    errors = [float((tensor.double() - back.double()).square().mean()) for _, back in results]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    assert errors == sorted(errors)


@pytest.mark.parametrize("where", ["channel", "token", "element", "offset"])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_something_massive_neither_hurts_the_rest_nor_costs_much(where, size):
    tensor = activations(1024, 256, dtype=torch.float32)
    massive = torch.zeros_like(tensor, dtype=torch.bool)
    index = {"channel": (slice(None), 7), "token": (0, slice(None)), "element": (0, 7), "offset": (slice(None), 7)}
    massive[index[where]] = True
    plain, plain_back = there_and_back(tensor)
    disturbed = torch.where(massive, tensor + size if where == "offset" else tensor * size, tensor)
    coded, back = there_and_back(disturbed)
    error, plain_error = (
        float((a - b)[~massive].square().mean()) for a, b in ((disturbed, back), (tensor, plain_back))
    )
    assert error < plain_error * 1.15
    assert_within_half_a_step(disturbed, back, coded.header["step"])
    assert coded.nbytes < plain.nbytes + int(massive.sum()) * 5 + 2000


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_arrives_exactly(dtype):
    tensor = activations(300, 80, dtype=dtype)
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf]).to(dtype)
    tensor[3, :3], tensor[299, 77:], tensor[100:103, 9] = odd, odd, odd
    coded, back = there_and_back(tensor)
    finite = tensor.isfinite()
    assert torch.equal(back[~finite].nan_to_num(1, 2, 3), tensor[~finite].nan_to_num(1, 2, 3))
    assert_within_half_a_step(tensor[finite], back[finite], coded.header["step"])
    assert coded.header["outliers"] >= 9


@pytest.mark.parametrize("fill", [torch.nan, torch.inf, 0.0, -3.140625, 65504.0])
@pytest.mark.parametrize("shape", [(), (5,), (200, 30)])
def test_constant_tensors_arrive_exactly(fill, shape):
    tensor = torch.full(shape, fill, dtype=torch.float16)
    _, back = there_and_back(tensor)
    assert torch.equal(back.nan_to_num(7.0, 8.0, 9.0), tensor.nan_to_num(7.0, 8.0, 9.0))


def test_constant_channels_cost_nothing_and_take_no_part_in_the_step():
    tensor = activations(1024, 128)
    alone, _ = there_and_back(tensor)
    coded, back = there_and_back(torch.cat([tensor, torch.full((1024, 512), 3.0, dtype=tensor.dtype)], dim=1))
    assert coded.header["step"] == alone.header["step"]
    assert torch.equal(back[:, 128:], torch.full_like(back[:, 128:], 3.0))
    assert coded.nbytes < alone.nbytes * 1.05 + 512 * 4


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_numbers_do_not_become_infinite(dtype):
    largest = torch.finfo(dtype).max
    tensor = (torch.rand(500, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1).double() * largest
    tensor = tensor.to(dtype)
    tensor[::7] = largest
    _, back = there_and_back(tensor, 1.0)
    assert bool(back.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.float64, torch.uint8])
def test_what_must_be_exact_is_sent_to_raw(dtype):
    with pytest.raises(CodecUnsupported, match="raw"):
        CODEC.encoder({"step": 0.2}).encode(torch.zeros(4).to(dtype))


def test_quality_sets_the_step():
    steps = [CODEC.settings(q, CODEC.capabilities())["step"] for q in ("transparent", "balanced", "fast")]
    assert steps == sorted(steps) and len(set(steps)) == 3
    with pytest.raises(CodecUnsupported, match="raw"):
        CODEC.settings("lossless", CODEC.capabilities())
    for peer in ({}, {"formats": ["step-zstd-9"]}, {"formats": None}):
        with pytest.raises(CodecUnsupported, match="version"):
            CODEC.settings("fast", peer)


@pytest.mark.parametrize(
    "bad",
    [{}, {"step": 0}, {"step": -1.0}, {"step": float("nan")}, {"step": "0.2"}, {"step": True}, {"step": 0.2, "x": 1}],
)
def test_settings_out_of_range_are_refused_at_both_ends(bad):
    for open_stream in (CODEC.encoder, CODEC.decoder):
        with pytest.raises(CodecUnsupported, match="step"):
            open_stream(bad)
