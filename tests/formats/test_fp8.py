"""Weights in 8-bit floats: read from every marking, and made to the numbers that the programs make of them."""

from __future__ import annotations

from pathlib import Path

import comfy_kitchen
import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor, TensorCoreFP8Layout
from diffusers.quantizers.bfl.utils import BFLFP8RLinear, dequantize_fp8r, quantize_fp8r
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.quantise.fp8 import Marking, fp8_cast, fp8_rows, fp8_scaled
from mesh_core.errors import CheckpointUnrecognised
from mesh_core.formats import float8
from mesh_core.formats.fp8_cast import Fp8CastFormat
from mesh_core.formats.fp8_row import Fp8RowFormat
from mesh_core.formats.fp8_scaled import Fp8ScaledFormat
from mesh_core.model.fingerprint import of_tensor
from mesh_core.model.stored_weight import StoredWeight
from tests.formats.stored import read, same_bits, saved, weight

CAST, ROW, SCALED = FORMATS = Fp8CastFormat(), Fp8RowFormat(), Fp8ScaledFormat()
CPU = torch.device("cpu")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
KINDS = {E4M3: "F8_E4M3", E5M2: "F8_E5M2"}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
QKV = ("qkv.weight", 0, 48)
MARKINGS: tuple[Marking, ...] = ("new", "metadata", "old")


def model() -> dict[str, Tensor]:
    return {
        "qkv.weight": weight(48, 64),
        "qkv.bias": weight(48, 1)[:, 0].bfloat16(),
        "out.weight": weight(48, 64, 1).bfloat16(),
        "norm.weight": torch.ones(64).bfloat16(),
    }


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_codes_without_scales_are_the_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = fp8_cast(model() | {"conv.weight": torch.randn(3, 2, 1, 2)}, set(model()) | {"conv.weight"}, dtype)
    header = saved(tmp_path, tensors, {})
    for name, codes in tensors.items():
        info = header.tensors[name]
        assert (info.dtype, info.shape, info.nbytes) == (f"fp8-cast/{KINDS[dtype]}", codes.shape, codes.numel())
        for numbers, short in TYPES.items():
            made = read(header, (name, 0, len(codes)), dtype=numbers)
            assert made.arithmetic == f"torch/fp8-cast/{short}" and made.nbytes == codes.numel()
            assert same_bits(made.dense(), codes.to(numbers))
    x = torch.randn(5, 64).bfloat16()
    made = read(header, ("qkv.weight", 16, 32), ("out.weight", 0, 2))
    expected = torch.cat([tensors["qkv.weight"].bfloat16()[16:32], tensors["out.weight"].bfloat16()[:2]])
    assert same_bits(linear(x, made), linear(x, expected))


@pytest.mark.parametrize("full", [False, True], ids=["", "full"])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("inputs", [{}, {"qkv.weight": 1.0}, {"qkv.weight": 0.25}], ids=str)
def test_every_marking_of_equal_content_gives_equal_bytes(
    inputs: dict[str, float], dtype: torch.dtype, full: bool, tmp_path: Path
) -> None:
    found = []
    for marking in MARKINGS:
        tensors, metadata = fp8_scaled(
            model(), ["qkv.weight"], marking, dtype=dtype, input_scales=inputs, full_precision=full
        )
        header = saved(tmp_path, tensors, metadata)
        kind = "F8_E4M3-full" if full and dtype == E4M3 else KINDS[dtype]
        info = header.tensors["qkv.weight"]
        assert (info.dtype, info.shape) == (f"fp8-scaled/{kind}", (48, 64))
        assert header.tensors.keys() == model().keys() and header.tensors["out.weight"].dtype == "BF16"
        made = read(header, QKV)
        assert info.stored is not None and SCALED.nbytes(info.stored, 48) == made.nbytes
        assert same_bits(made.parts["codes"].float(), tensors["qkv.weight"].float())
        assert made.parts["scale"].shape == (1,) and made.parts["scale"].item() == weight(48, 64).abs().max() / (
            torch.finfo(dtype).max
        )
        assert ("input_scale" in made.parts) == (kind == "F8_E4M3")
        if kind == "F8_E4M3":
            assert made.parts["input_scale"].tolist() == [inputs.get("qkv.weight", 1.0)]
        found.append(of_tensor(made))
    assert len(set(found)) == 1


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("numbers", TYPES, ids=str)
def test_scaled_weights_are_dequantised_as_comfy_kitchen_does(
    numbers: torch.dtype, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, metadata = fp8_scaled({"qkv.weight": weight(48, 64, 2)}, ["qkv.weight"], "metadata", dtype=dtype)
    header = saved(tmp_path, tensors, metadata)
    codes, scale = tensors["qkv.weight"], tensors["qkv.weight_scale"]
    with comfy_kitchen.use_backend("eager"):
        theirs = comfy_kitchen.dequantize_per_tensor_fp8(codes, scale, numbers)
    made = read(header, QKV, dtype=numbers)
    assert made.arithmetic == f"kitchen/fp8-dequant/{TYPES[numbers]}" and same_bits(made.dense(), theirs)
    x, bias = torch.randn(2, 3, 64).to(numbers), torch.randn(48).to(numbers)
    assert same_bits(linear(x, made, bias), linear(x, theirs, bias))
    rows = read(header, ("qkv.weight", 4, 9), ("qkv.weight", 40, 48), dtype=numbers)
    assert same_bits(rows.dense(), torch.cat([theirs[4:9], theirs[40:48]]))
    monkeypatch.setattr(float8, "AT_ONCE", 256)  # four rows at a time
    once = read(header, QKV, dtype=numbers, arithmetic=f"kitchen-cuda/fp8-dequant/{TYPES[numbers]}")
    assert same_bits(once.dense(), (codes.double() * scale.double()).float().to(numbers))
    assert (numbers == torch.float32) == same_bits(once.dense(), theirs)


def test_numbers_asked_for_in_another_type_are_made_in_the_named_one(tmp_path: Path) -> None:
    header = saved(tmp_path, *fp8_scaled(model(), ["qkv.weight"]))
    made = read(header, QKV)
    assert same_bits(made.to(torch.float32).detach().as_subclass(StoredWeight).dense(), made.dense().float())
    with pytest.raises(CheckpointUnrecognised, match="computes with fp8-scaled/F8_E4M3 weights as 'kitchen/int8/bf16'"):
        SCALED.dequantise(made.parts, "F8_E4M3", (48, 64), torch.bfloat16, "kitchen/int8/bf16")


@pytest.mark.parametrize("numbers", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [48, 40], ids=["multiplied", "rows that no card takes"])
@pytest.mark.parametrize("inputs", [None, 0.01], ids=str)
def test_inputs_are_quantised_as_comfy_kitchen_does(
    inputs: float | None, rows: int, numbers: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch multiplies 8-bit floats on CPUs as well; there, it is offered for this test alone."""
    monkeypatch.setattr(float8, "multiplies", lambda device: True)
    x, bias = torch.randn(2, 5, 64).to(numbers) * 8, torch.randn(rows).to(numbers)
    scales = {} if inputs is None else {"a.weight": inputs}
    tensors, metadata = fp8_scaled({"a.weight": weight(rows, 64)}, ["a.weight"], input_scales=scales)
    name = f"kitchen/fp8-mm/{TYPES[numbers]}"
    made = read(saved(tmp_path, tensors, metadata), ("a.weight", 0, rows), dtype=numbers, arithmetic=name)
    with comfy_kitchen.use_backend("eager"):
        scale = tensors["a.weight_scale"]
        params = TensorCoreFP8Layout.Params(scale=scale, orig_dtype=numbers, orig_shape=(rows, 64))
        quantised = QuantizedTensor.from_float(x.reshape(10, 64), "TensorCoreFP8Layout", scale=inputs or 1.0)
        theirs = linear(quantised, QuantizedTensor(tensors["a.weight"], "TensorCoreFP8Layout", params), bias)
        dense = linear(
            quantised.dequantize(), comfy_kitchen.dequantize_per_tensor_fp8(tensors["a.weight"], scale, numbers), bias
        )
    expected = theirs if rows == 48 else dense
    assert same_bits(linear(x, made, bias), expected.reshape(2, 5, rows))
    assert not torch.equal(linear(x, made, bias), linear(x, made.dense(), bias))
    # A single row per sample is not what ComfyUI quantises.
    assert same_bits(linear(x[None], made, bias), linear(x[None], made.dense(), bias))


def test_what_can_be_done_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once, plain = "kitchen-cuda/fp8-dequant/bf16", "kitchen/fp8-dequant/bf16"
    assert SCALED.arithmetics("F8_E4M3", torch.bfloat16, CPU) == (plain, once)
    assert ROW.arithmetics("F8_E4M3", torch.bfloat16, CPU) == ("diffusers/fp8r-dequant/bf16",)
    assert all(f.arithmetics("F8_E4M3", torch.float64, CPU) == () for f in FORMATS)
    assert all(f.arithmetics("I8", torch.bfloat16, CPU) == () for f in FORMATS)
    made = read(saved(tmp_path, *fp8_scaled(model(), ["qkv.weight"])), QKV)
    multiplied = StoredWeight(SCALED, "F8_E4M3", (48, 64), torch.bfloat16, made.parts, "kitchen/fp8-mm/bf16")
    with pytest.raises(CheckpointUnrecognised, match="'kitchen/fp8-mm/bf16', which cannot be done here"):
        linear(torch.zeros(1, 64).bfloat16(), multiplied)
    for capability, fast in (((8, 6), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(float8, "_capability", lambda device, found=capability: found)
        float8.multiplies.cache_clear()
        cuda = torch.device("cuda", 0)
        mm, mm_once = ("kitchen/fp8-mm/bf16", "kitchen-cuda/fp8-mm/bf16")
        assert SCALED.arithmetics("F8_E4M3", torch.bfloat16, cuda) == (
            (plain, mm, once, mm_once) if fast else (plain, once)
        )
        assert SCALED.arithmetics("F8_E4M3-full", torch.bfloat16, cuda) == (plain, once)
        assert SCALED.arithmetics("F8_E5M2", torch.bfloat16, cuda) == (plain, once)
        assert len(ROW.arithmetics("F8_E4M3", torch.float16, cuda)) == (2 if fast else 1)
    float8.multiplies.cache_clear()


@pytest.mark.parametrize("numbers", TYPES, ids=str)
def test_scales_of_rows_are_those_of_diffusers(numbers: torch.dtype, tmp_path: Path) -> None:
    tensors, metadata = fp8_rows(model(), ["qkv.weight"])
    codes, scale = quantize_fp8r(weight(48, 64))
    assert same_bits(tensors["qkv.weight"].float(), codes.float()) and same_bits(tensors["qkv.weight_scale"], scale)
    header = saved(tmp_path, tensors | {"qkv.input_scale": torch.tensor(1.0)}, metadata)
    info = header.tensors["qkv.weight"]
    assert (info.dtype, info.shape) == ("fp8-row/F8_E4M3", (48, 64)) and header.tensors.keys() == model().keys()
    made = read(header, QKV, dtype=numbers)
    assert made.arithmetic == f"diffusers/fp8r-dequant/{TYPES[numbers]}"
    assert info.stored is not None and ROW.nbytes(info.stored, 48) == made.nbytes
    assert same_bits(made.dense(), dequantize_fp8r(codes, scale).to(numbers))
    theirs = BFLFP8RLinear(64, 48, bias=True, compute_dtype=numbers)
    theirs.weight.data, theirs.weight_scale = codes, scale
    theirs.bias.data = torch.randn(48).to(numbers)
    x = torch.randn(2, 3, 64).to(numbers)
    assert same_bits(linear(x, made, theirs.bias), theirs(x))
    rows = read(header, ("qkv.weight", 40, 48), ("qkv.weight", 3, 4), dtype=numbers)
    assert same_bits(rows.dense(), torch.cat([made.dense()[40:48], made.dense()[3:4]]))


def test_inputs_of_rows_are_quantised_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "multiplies", lambda device: True)
    header = saved(tmp_path, *fp8_rows(model(), ["qkv.weight"]))
    made = read(header, QKV, arithmetic="diffusers/fp8r-mm/bf16")
    x, bias = torch.randn(2, 3, 64).bfloat16(), torch.randn(48).bfloat16()
    codes, scale = quantize_fp8r(x.reshape(6, 64))
    exact = dequantize_fp8r(codes, scale) @ (made.parts["codes"].float() * made.parts["scale"][:, None]).T
    assert torch.allclose(linear(x, made, bias).float(), exact.reshape(2, 3, 48) + bias, atol=3e-2)
    assert same_bits(made.dense(), read(header, QKV).dense())
