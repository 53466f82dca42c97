"""Weights in ggml's blocks: read by rows, and made to the numbers that diffusers makes of them."""

from __future__ import annotations

import struct
import weakref
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from diffusers import Flux2Transformer2DModel, GGUFQuantizationConfig
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_functions, dequantize_gguf_tensor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.quantise.gguf import quantise, write_gguf
from mesh_core.builtin import installed_plugins
from mesh_core.errors import CheckpointCorrupt, CheckpointUnrecognised
from mesh_core.formats import ggml
from mesh_core.formats import gguf as ours
from mesh_core.formats.ggml import ARITHMETIC
from mesh_core.formats.gguf import KINDS, GgufFormat, parts_of, shape_of
from mesh_core.model.checkpoint import CheckpointHeader, read_header
from mesh_core.model.claims import with_stored_weights
from mesh_core.model.library import recognise
from mesh_core.model.numerics import LORA, Numerics, usual_numerics
from mesh_core.model.spans import BlockSpan
from mesh_core.model.spec import Conditioning, ParameterSpec, Piece
from mesh_core.model.weights import WeightReader
from tests.adapters import tiny

FORMAT = GgufFormat()
CPU = torch.device("cpu")
SCOPE = BlockSpan(0, 1)
ERRORS = {
    "Q4_0": 0.10,
    "Q4_1": 0.10,
    "Q5_0": 0.05,
    "Q5_1": 0.05,
    "Q8_0": 0.01,
    "Q2_K": 0.40,
    "Q3_K": 0.20,
    "Q4_K": 0.10,
    "Q5_K": 0.05,
    "Q6_K": 0.025,
    "IQ4_NL": 0.10,
    "IQ4_XS": 0.10,
}
"""By kind, what may be lost of normally distributed weights: the root of the mean square error over theirs."""


def weight(rows: int = 6, columns: int = 512, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def type_of(kind: str) -> Any:
    return gguf.GGMLQuantizationType[kind]


def claimed(file: Path) -> CheckpointHeader:
    return with_stored_weights(read_header(file), [FORMAT])


def test_the_kinds_are_all_that_diffusers_computes_with() -> None:
    assert {type_of(k) for k in KINDS.values()} == dequantize_functions.keys() - {type_of("BF16")}
    assert all(type_of(kind) == number for number, kind in KINDS.items()) and set(ERRORS) == set(KINDS.values())


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_numbers_are_those_of_diffusers(
    kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "x.gguf", {"x.weight": weight()}, kind)
    header = claimed(file)
    info = header.tensors["x.weight"]
    assert (info.dtype, info.shape, info.nbytes) == (f"gguf/{kind}", (6, 512), file_bytes(file, "x.weight"))
    monkeypatch.setattr(ours, "_AT_ONCE", 1024)  # two rows at a time, and all at once
    read = WeightReader(header).read_stored(ParameterSpec((6, 512), info.dtype, (Piece("x.weight"),), SCOPE), dtype)
    codes = torch.from_numpy(quantise(weight(), kind))
    theirs = dequantize_gguf_tensor(GGUFParameter(codes, quant_type=type_of(kind))).to(dtype)
    assert torch.equal(read.parts["codes"], codes) and read.arithmetic == "ggml/fp16" and read.nbytes == info.nbytes
    assert read.dense().dtype == dtype and torch.equal(read.dense(), theirs)
    monkeypatch.setattr(ours, "_AT_ONCE", 1 << 24)
    assert torch.equal(read.dense(), theirs)
    x = torch.randn(3, 512).to(dtype)
    assert torch.equal(torch.nn.functional.linear(x, read), torch.nn.functional.linear(x, theirs))


def file_bytes(file: Path, name: str) -> int:
    (found,) = (t for t in gguf.GGUFReader(file).tensors if t.name == name)
    return int(found.n_bytes)


def test_a_library_that_makes_other_bits_has_an_arithmetic_of_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    known = ggml._functions()
    assert [FORMAT.arithmetics(k, torch.bfloat16, CPU) for k in ERRORS] == [("ggml/fp16",)] * len(ERRORS)

    def in_float32(blocks: Tensor, size: int, nbytes: int) -> Tensor:
        d, codes = blocks[:, :2].view(torch.float16).float(), blocks[:, 2:].view(torch.int8)
        return d * codes

    monkeypatch.setattr(ggml, "_functions", lambda: {"Q8_0": (in_float32, 32), "Q4_0": known["Q4_0"]})
    ggml._arithmetic.cache_clear()
    (name,) = FORMAT.arithmetics("Q8_0", torch.bfloat16, CPU)
    assert name.startswith("ggml/fp16-") and FORMAT.arithmetics("Q4_0", torch.bfloat16, CPU) == ("ggml/fp16",)
    with pytest.raises(CheckpointUnrecognised, match="does not compute with GGUF's IQ4_XS"):
        FORMAT.arithmetics("IQ4_XS", torch.bfloat16, CPU)
    ggml._arithmetic.cache_clear()


@pytest.mark.parametrize("kind", ERRORS)
def test_the_numbers_are_close_to_what_was_written(kind: str, tmp_path: Path) -> None:
    x = weight(64)
    codes = quantise(x, kind)
    exact = torch.from_numpy(gguf.quants.dequantize(codes, type_of(kind)))
    made = FORMAT.dequantise(parts_of(torch.from_numpy(codes), kind), kind, (64, 512), torch.float32, ARITHMETIC)
    assert (made - exact).square().mean() < x.square().mean() * 1e-5
    assert (made - x).square().mean().sqrt() < ERRORS[kind] * x.square().mean().sqrt()


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0"])
def test_only_the_rows_of_a_parameter_are_read(kind: str, tmp_path: Path) -> None:
    header = claimed(write_gguf(tmp_path / "x.gguf", {"qkv.weight": weight(), "o.weight": weight(3, seed=1)}, kind))
    reader = WeightReader(header)
    row = header.tensors["qkv.weight"].nbytes // 6
    pieces = (Piece("qkv.weight", 4, 6), Piece("o.weight"), Piece("qkv.weight", 0, 1))
    joined = reader.read_stored(ParameterSpec((6, 512), f"gguf/{kind}", pieces, SCOPE), torch.bfloat16)
    assert reader.bytes_read == 6 * row == joined.nbytes
    first, second = (torch.from_numpy(quantise(w, kind)) for w in (weight(), weight(3, seed=1)))
    assert torch.equal(joined.parts["codes"], torch.cat([first[4:6], second, first[0:1]]))
    stored = header.tensors["qkv.weight"].stored
    assert stored is not None and FORMAT.nbytes(stored, 2) == 2 * row


def test_a_tensor_that_was_brought_into_rows_of_blocks_has_its_own_shape(tmp_path: Path) -> None:
    file, x = tmp_path / "x.gguf", weight(8, 256)
    writer = gguf.GGUFWriter(file, "wan")
    writer.add_array("comfy.gguf.orig_shape.x.weight", [4, 2, 16, 16])
    writer.add_array("comfy.gguf.orig_shape.y.weight", [16, 8, 16])
    writer.add_tensor("x.weight", quantise(x, "Q4_K"), raw_dtype=type_of("Q4_K"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = claimed(file)
    spec = ParameterSpec((2, 2, 16, 16), "gguf/Q4_K", (Piece("x.weight", 1, 3),), SCOPE)
    read = WeightReader(header).read_stored(spec, torch.float16).dense()
    exact = torch.from_numpy(gguf.quants.dequantize(quantise(x, "Q4_K"), type_of("Q4_K")))
    assert header.tensors["x.weight"].shape == (4, 2, 16, 16)
    assert torch.allclose(read.float(), exact.reshape(4, 2, 16, 16)[1:3], atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "place"),
    [(k, at) for k, places in ours._SCALES.items() for at in places],
)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_scales_that_are_no_numbers_are_refused(kind: str, place: int, value: float, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", {"x.weight": weight()}, kind)
    header = claimed(file)
    content = bytearray(file.read_bytes())
    size = gguf.GGML_QUANT_SIZES[type_of(kind)][1]
    struct.pack_into("<e", content, header.tensors["x.weight"].offset + 5 * size + place, value)
    file.write_bytes(content)
    spec = ParameterSpec((6, 512), f"gguf/{kind}", (Piece("x.weight"),), SCOPE)
    with pytest.raises(CheckpointCorrupt, match=r"x\.weight has scales that are no finite numbers"):
        WeightReader(claimed(file)).read_stored(spec, torch.bfloat16)


def test_blocks_of_zeros_are_zeros(tmp_path: Path) -> None:
    for kind in ERRORS:
        made = parts_of(torch.from_numpy(quantise(torch.zeros(2, 256), kind)), kind)
        assert not FORMAT.dequantise(made, kind, (2, 256), torch.bfloat16, ARITHMETIC).any()


def packed(path: Path, shape: tuple[int, ...], number: int, nbytes: int, notes: dict[str, int] | None = None) -> Path:
    """A file of one tensor of any type."""
    text = b"".join(struct.pack("<Q", len(k)) + k.encode() + struct.pack("<II", 4, v) for k, v in (notes or {}).items())
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(notes or {})) + text
    head += struct.pack("<Q", 8) + b"x.weight" + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    head += struct.pack("<IQ", number, 0)
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(nbytes))
    return path


def test_what_is_not_computed_with_is_refused_by_name(tmp_path: Path) -> None:
    refused = {
        "IQ3_S, which is not computed": packed(tmp_path / "a.gguf", (2, 256), 21, 220),
        "type 77, which is not computed": packed(tmp_path / "b.gguf", (2, 256), 77, 220),
        "x.weight, which is no matrix": packed(tmp_path / "c.gguf", (256,), 12, 144),
        "version 3 of ggml's blocks": packed(
            tmp_path / "d.gguf", (2, 256), 12, 288, {"general.quantization_version": 3}
        ),
    }
    for says, file in refused.items():
        with pytest.raises(CheckpointUnrecognised, match=says) as told:
            claimed(file)
        assert str(file) in told.value.message and told.value.hint
    assert claimed(packed(tmp_path / "e.gguf", (2, 256), 12, 288)).tensors["x.weight"].dtype == "gguf/Q4_K"


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(file, "wan")
    writer.add_array("comfy.gguf.orig_shape.x.weight", [16, 4, 2, 2])
    writer.add_tensor("x.weight", quantise(weight(1, 256), "Q4_K"), raw_dtype=type_of("Q4_K"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointUnrecognised, match="reach over the ends of its rows"):
        claimed(file)


@pytest.mark.parametrize("missing", ["gguf", "diffusers"])
def test_without_the_libraries_the_command_that_installs_them_is_named(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "x.gguf", {"x.weight": weight()}, "Q8_0")
    there = ggml._there
    monkeypatch.setattr(ggml, "_there", lambda name: name != missing and there(name))
    with pytest.raises(CheckpointUnrecognised, match=f"{missing} is missing") as told:
        claimed(file)
    assert told.value.hint == 'pip install "comfyui-mesh[gguf]"'
    ggml._functions.cache_clear()
    ggml._arithmetic.cache_clear()
    with pytest.raises(CheckpointUnrecognised, match=f"{missing} is missing"):
        FORMAT.arithmetics("Q8_0", torch.bfloat16, CPU)
    plain = write_gguf(tmp_path / "y.gguf", {"x.weight": weight()}, "Q8_0", keep=lambda name: True)
    assert claimed(plain).tensors["x.weight"].dtype == "F32"


def test_a_parameter_of_diffusers_has_the_same_parts() -> None:
    codes = torch.from_numpy(quantise(weight(), "Q5_K"))
    parameter = GGUFParameter(codes, quant_type=type_of("Q5_K"))
    parts = parts_of(parameter, KINDS[parameter.quant_type])
    assert type(parts["codes"]) is Tensor and torch.equal(parts["codes"], codes)
    assert parts["codes"].data_ptr() == codes.data_ptr() and shape_of(parameter, "Q5_K") == (6, 512)
    rows = parts_of(torch.cat([parameter[2:4], parameter[:1]]), "Q5_K")
    assert torch.equal(rows["codes"], torch.cat([codes[2:4], codes[:1]]))
    for data, kind in ((codes.float(), "Q5_K"), (codes[:, 1:], "Q5_K"), (codes[0], "Q5_K")):
        with pytest.raises(CheckpointCorrupt):
            parts_of(data, kind)
    with pytest.raises(CheckpointUnrecognised, match="Q8_K"):
        parts_of(codes, "Q8_K")


class Peak(TorchDispatchMode):
    """Bytes that tensors held at most which were made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.held:
                self.held[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.held.pop, storage._cdata)
        self.most = max(self.most, sum(self.held.values()))
        return made


@pytest.mark.parametrize("kind", ERRORS)
def test_making_numbers_takes_the_memory_that_was_foretold(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_AT_ONCE", 1 << 17)
    shape = (1024, 512)
    parts = parts_of(torch.from_numpy(quantise(weight(*shape), kind)), kind)
    FORMAT.dequantise(parts, kind, shape, torch.bfloat16, ARITHMETIC)
    codes = parts["codes"].nbytes
    with Peak() as peak:
        FORMAT.dequantise(parts, kind, shape, torch.bfloat16, ARITHMETIC)
    foretold = FORMAT.transient(kind, shape, torch.bfloat16)
    assert foretold / 2 < peak.most - codes <= foretold < 6 * 1024 * 512


@pytest.fixture(scope="module")
def model() -> Flux2Transformer2DModel:
    return tiny.transformer(
        guidance=False, num_attention_heads=8, joint_attention_dim=256, in_channels=16, dtype=torch.bfloat16
    )


def mixed(name: str) -> str:
    """As the mixtures that are called Q4_K_M."""
    return "Q6_K" if "img_mlp.2" in name else "Q5_0" if "linear2" in name else "Q4_K"


@pytest.mark.parametrize("kind", ["Q8_0", mixed], ids=["Q8_0", "mixed"])
def test_a_cut_model_computes_what_diffusers_computes_with_the_whole(
    kind: Any, model: Flux2Transformer2DModel, tmp_path: Path
) -> None:
    file = write_gguf(
        tmp_path / "klein.gguf",
        tiny.to_original(model),
        kind,
        keep=lambda name: name.startswith(("img_in", "txt_in", "time_in", "final_layer")),
    )
    model.save_config(tmp_path)
    whole = Flux2Transformer2DModel.from_single_file(
        str(file),
        config=str(tmp_path),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
        torch_dtype=torch.bfloat16,
    )
    plugins = installed_plugins()
    checkpoint = recognise(read_header(file), plugins)
    spec, adapter = checkpoint.spec, checkpoint.adapter
    assert spec.family == "klein"
    numerics = usual_numerics(spec, torch.bfloat16, CPU, plugins.weight_formats())
    assert isinstance(numerics, Numerics) and all(
        how == ARITHMETIC for label, how in numerics.arithmetic if label != LORA
    )
    given = tiny.inputs(guidance=False, dtype=torch.bfloat16)
    given["encoder_hidden_states"] = torch.randn(1, 7, 256).bfloat16()
    with torch.no_grad():
        expected = whole(**given, return_dict=False)[0]
        state, conditioning = adapter.begin(spec, given)
        for span in (BlockSpan(0, 1), BlockSpan(1, 3), BlockSpan(3, 5)):
            stage = adapter.build_stage(spec, span, WeightReader(checkpoint.header), device=CPU, numerics=numerics)
            needed = set(spec.constants_of(span))
            part = Conditioning({n: t for n, t in conditioning.constants.items() if n in needed}, conditioning.options)
            state = stage(state, part)
        found = adapter.finish(spec, state)
    assert torch.equal(found[0] if isinstance(found, tuple) else found, expected)
