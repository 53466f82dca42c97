"""Damaged files of quantised models are refused, or are models; a short run of the fuzzer, and kinds of damage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.damaged_checkpoints import Entry, Parsed, parsed
from benchmarks.fuzz_checkpoints import MODEL, Fuzzer, settled, small
from benchmarks.quantise.kinds import WRITERS
from mesh_core.builtin import installed_plugins
from mesh_core.errors import CheckpointCorrupt
from mesh_core.model.checkpoint import read_header
from mesh_core.model.library import recognise
from mesh_core.model.numerics import usual_numerics
from mesh_core.model.weights import WeightReader

ONE_OF_EACH = ("Q4_K", "Q8_0", "fp8-e4m3", "fp8-scaled-old", "fp8-mixed", "fp8-row", "nvfp4", "mxfp8", "int8-convrot")
ROUNDS = 250


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return small(MODEL)


@pytest.fixture
def quick() -> Iterator[None]:
    with settled():
        yield


def test_a_short_run_of_the_fuzzer(tensors: Mapping[str, Tensor], quick: None, tmp_path: Path) -> None:
    fuzzer = Fuzzer(tensors, tmp_path, ONE_OF_EACH, seed=7)
    for _ in range(ROUNDS):
        fuzzer.round()
    stages = sum(count for what, count in fuzzer.seen.items() if what.endswith("a stage"))
    assert ROUNDS / 10 < stages < ROUNDS / 2 and fuzzer.seen.total() == ROUNDS


CONFIGS: dict[str, tuple[object, str]] = {
    "num_layers": (10**9, "says num_layers=1000000000"),
    "num_single_layers": (900, r"says num_layers \+ num_single_layers=901, of 25 tensors"),
    "attention_head_dim": ("128", "says attention_head_dim='128'"),
    "in_channels": (0, "says in_channels=0"),
    "mlp_ratio": ("three", "its model class cannot be made"),
    "rope_theta": (10**400, "beyond all that can be meant"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_of_no_model(name: str, tensors: Mapping[str, Tensor], quick: None, tmp_path: Path) -> None:
    value, says = CONFIGS[name]
    fuzzer = Fuzzer(tensors, tmp_path, ["fp8-e4m3"], seed=0)
    folder = fuzzer.folder_of(fuzzer.intact["fp8-e4m3"].content(), {})
    assert recognise(read_header(folder), installed_plugins()).spec.blocks == 2
    fuzzer.folder_of(fuzzer.intact["fp8-e4m3"].content(), {name: value})
    with pytest.raises(CheckpointCorrupt, match=says):
        recognise(read_header(folder), installed_plugins())


def written(kind: str, tensors: Mapping[str, Tensor], folder: Path) -> Parsed:
    return parsed(WRITERS[kind](tensors, folder / kind, {}))


def test_a_scale_of_a_whole_weight_is_counted_once_where_the_weight_is_joined(
    tensors: Mapping[str, Tensor], quick: None, tmp_path: Path
) -> None:
    """The last modulation has its halves the other way round in the model."""
    plugins = installed_plugins()
    found = recognise(read_header(WRITERS["fp8-scaled"](tensors, tmp_path / "model", {})), plugins)
    spec = found.spec.parameters["norm_out.linear.weight"]
    assert len(spec.pieces) == 2 and spec.shape == (512, 256) and spec.dtype == "fp8-scaled/F8_E4M3"
    dtype, cpu = torch.bfloat16, torch.device("cpu")
    numerics = usual_numerics(found.spec, dtype, cpu, plugins.weight_formats())
    held = WeightReader(found.header).read_stored(spec, dtype, numerics.arithmetic_of(spec))
    assert spec.stored_bytes == held.nbytes == 512 * 256 + 8


SHAPES: dict[str, tuple[str, tuple[int, ...], str]] = {
    "more rows": ("txt_in.weight", (512, 192), "more rows than the 256"),
    "more rows of a fused one": ("single_blocks.0.linear1.weight", (2305, 256), "more rows than the 2304"),
    "fewer rows": ("single_blocks.0.linear1.weight", (2303, 256), "does not have the shape"),
    "a vector": ("txt_in.weight", (256,), r"txt_in.weight has the shape \[256\]"),
    "three dimensions": ("img_in.weight", (2, 128, 128), r"img_in.weight has the shape \[2, 128, 128\]"),
    "a number": ("final_layer.linear.weight", (), r"final_layer.linear.weight has the shape \[\]"),
    "no rows": ("double_blocks.0.img_attn.norm.query_norm.weight", (0,), r"query_norm.weight has the shape \[0\]"),
    "no columns, and rows without end": ("img_in.weight", (1 << 40, 0), "img_in.weight has the shape"),
    "rows without end": ("img_in.weight", ((1 << 62) + 1, 0), "img_in.weight has the shape"),
    "heads that do not fit": ("double_blocks.0.img_attn.norm.query_norm.weight", (96,), "do not fit each other"),
}


@pytest.mark.parametrize("what", SHAPES)
def test_shapes_that_no_model_has(what: str, tensors: Mapping[str, Tensor], quick: None, tmp_path: Path) -> None:
    name, shape, says = SHAPES[what]
    made = written("fp8-e4m3", tensors, tmp_path)
    made.tensors[name] = made.tensors[name].fitted(shape=shape)
    (tmp_path / "damaged").write_bytes(made.content())
    with pytest.raises(CheckpointCorrupt, match=says):
        recognise(read_header(tmp_path / "damaged"), installed_plugins())


@pytest.mark.parametrize("number", ["2", "999999", "4" * 5000, "²"])
def test_numbers_of_blocks_in_names_are_not_believed(
    number: str, tensors: Mapping[str, Tensor], quick: None, tmp_path: Path
) -> None:
    made = written("fp8-e4m3", tensors, tmp_path)
    made.tensors[f"double_blocks.{number}.more.weight"] = Entry("F32", (1,), bytes(4))
    (tmp_path / "damaged").write_bytes(made.content())
    if len(number) in (1, 6) and number.isascii():
        with pytest.raises(CheckpointCorrupt, match=f"2 of {int(number) + 1} double_blocks"):
            recognise(read_header(tmp_path / "damaged"), installed_plugins())
    else:
        found = recognise(read_header(tmp_path / "damaged"), installed_plugins())
        assert found.spec.blocks == 2
