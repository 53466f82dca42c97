"""Reading a stage's parameters: those and no others, from any layout, shared between stages."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

from mesh_core.errors import CheckpointChanged, CheckpointCorrupt
from mesh_core.model.checkpoint import CheckpointHeader, read_header
from mesh_core.model.numerics import Numerics
from mesh_core.model.pool import ParameterPool
from mesh_core.model.spans import BlockSpan
from mesh_core.model.spec import ModelSpec, ParameterSpec, Piece
from mesh_core.model.weights import WeightReader
from mesh_klein import KleinAdapter
from tests.adapters import tiny

ADAPTER = KleinAdapter()
MODEL = tiny.transformer(guidance=False)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> CheckpointHeader:
    path = tmp_path_factory.mktemp("models") / "fused.safetensors"
    tiny.save_single_file(MODEL, path)
    return read_header(path)


@pytest.fixture(scope="module")
def spec(header: CheckpointHeader) -> ModelSpec:
    found = ADAPTER.recognise(header)
    assert found is not None
    return found


def size(spec: ModelSpec, span: BlockSpan, itemsize: int = 4) -> int:
    return sum(p.elements for p in spec.parameters_of(span).values()) * itemsize


@pytest.mark.parametrize("span", [BlockSpan(0, 2), BlockSpan(1, 4), BlockSpan(4, 5), BlockSpan(2, 2)], ids=str)
def test_exactly_the_stage_is_read_even_from_fused_tensors(
    header: CheckpointHeader, spec: ModelSpec, span: BlockSpan
) -> None:
    reader = WeightReader(header)
    stage = ADAPTER.build_stage(spec, span, reader, device=CPU, numerics=Numerics(torch.float32))
    assert reader.bytes_read == size(spec, span)
    held = {n: p for n, p in stage.model.named_parameters() if not p.is_meta}
    assert held.keys() == spec.parameters_of(span).keys()
    original = dict(MODEL.named_parameters())
    assert all(torch.equal(p, original[n]) for n, p in held.items())


def test_weights_are_cast_as_torch_casts_them(header: CheckpointHeader, spec: ModelSpec) -> None:
    stage = ADAPTER.build_stage(
        spec, BlockSpan(0, 1), WeightReader(header), device=CPU, numerics=Numerics(torch.bfloat16)
    )
    name = "transformer_blocks.0.attn.to_k.weight"
    assert torch.equal(stage.model.get_parameter(name), MODEL.get_parameter(name).to(torch.bfloat16))


def test_progress_ends_at_the_whole(header: CheckpointHeader, spec: ModelSpec) -> None:
    seen: list[tuple[int, int]] = []
    reader = WeightReader(header, progress=lambda done, total: seen.append((done, total)))
    ADAPTER.build_stage(spec, BlockSpan(0, 2), reader, device=CPU, numerics=Numerics(torch.bfloat16))
    whole = size(spec, BlockSpan(0, 2), 2)
    assert seen[-1] == (whole, whole) and seen == sorted(seen) and len(seen) > 10


def test_stages_that_overlap_share_memory_and_the_last_one_frees_it(header: CheckpointHeader, spec: ModelSpec) -> None:
    pool = ParameterPool()

    def stage(span: BlockSpan) -> tuple[nn.Module, int]:
        reader = WeightReader(header, model="it", pool=pool)
        return ADAPTER.build_stage(spec, span, reader, device=CPU, numerics=Numerics(torch.float32)), reader.bytes_read

    first, _ = stage(BlockSpan(0, 3))
    second, read = stage(BlockSpan(2, 5))
    assert read == size(spec, BlockSpan(0, 5)) - size(spec, BlockSpan(0, 3))
    assert pool.nbytes(CPU) == size(spec, BlockSpan(0, 5))
    del first
    gc.collect()
    assert pool.nbytes(CPU) == size(spec, BlockSpan(2, 5))
    del second
    gc.collect()
    assert pool.nbytes(CPU) == 0


def test_another_model_shares_nothing(header: CheckpointHeader, spec: ModelSpec) -> None:
    pool, span = ParameterPool(), BlockSpan(0, 1)
    readers = [WeightReader(header, model=name, pool=pool) for name in ("one", "two")]
    stages = [ADAPTER.build_stage(spec, span, r, device=CPU, numerics=Numerics(torch.float32)) for r in readers]
    assert [r.bytes_read for r in readers] == [size(spec, span)] * 2 and len(stages) == 2


def test_a_file_that_shrank_since_it_was_recognised_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tiny.save_single_file(MODEL, path)
    header = read_header(path)
    spec = ADAPTER.recognise(header)
    assert spec is not None
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointChanged, match=r"m\.safetensors changed while it was in use"):
        ADAPTER.build_stage(spec, BlockSpan(0, 5), WeightReader(header), device=CPU, numerics=Numerics(torch.float32))


def test_a_parameter_of_another_shape_is_refused(header: CheckpointHeader) -> None:
    name = "double_blocks.0.img_attn.proj.weight"
    wrong = ParameterSpec(header.tensors[name].shape, "F32", (Piece(name),), BlockSpan(0, 1))
    with pytest.raises(CheckpointCorrupt, match="weight has shape"):
        WeightReader(header).fill(nn.Linear(3, 5), {"weight": wrong}, device=CPU, numerics=Numerics(torch.float32))


def test_pieces_that_do_not_make_the_parameter_are_refused(header: CheckpointHeader) -> None:
    name = "double_blocks.0.img_attn.proj.weight"
    wrong = ParameterSpec((64, 64), "F32", (Piece(name, 0, 32),), BlockSpan(0, 1))
    with pytest.raises(CheckpointCorrupt, match="bytes instead of"):
        WeightReader(header).read(wrong)
