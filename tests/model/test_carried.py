"""What a stage would lose of a model is refused by name: modules kept in float32, tensors that are no parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mesh_core.errors import CheckpointUnrecognised
from mesh_core.model.adapting import describe_parameters
from mesh_core.model.checkpoint import CheckpointHeader, read_header
from mesh_core.model.numerics import Numerics
from mesh_core.model.spans import BlockSpan
from mesh_core.model.spec import ModelSpec, Piece
from mesh_core.model.weights import WeightReader
from mesh_klein import KleinAdapter
from tests.adapters import tiny

CPU = torch.device("cpu")


class Family(KleinAdapter):
    """Klein, but for something that its model class has besides."""

    def __init__(self, change: Callable[[nn.Module], None]) -> None:
        self.change = change

    def skeleton(self, spec: ModelSpec) -> nn.Module:
        model = super().skeleton(spec)
        self.change(model)
        return model


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> CheckpointHeader:
    return read_header(tiny.saved(tmp_path_factory.mktemp("models") / "klein", doubles=1, singles=1))


def built(change: Callable[[nn.Module], None], header: CheckpointHeader, dtype: torch.dtype) -> Any:
    adapter = Family(change)
    spec = adapter.recognise(header)
    assert spec is not None
    return adapter.build_stage(spec, BlockSpan(1, 2), WeightReader(header), device=CPU, numerics=Numerics(dtype))


def keeping(names: Any) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.__class__ = type("Keeping", (type(model),), {"_keep_in_fp32_modules": names})

    return change


@pytest.mark.parametrize("names", [["norm_out"], "norm_out", {"rope", "norm_out"}], ids=str)
def test_modules_that_stay_in_float32_are_refused_in_less(header: CheckpointHeader, names: Any) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(CheckpointUnrecognised, match=r"Keeping keeps norm_out\.linear\.weight in float32") as told:
            built(keeping(names), header, dtype)
        assert "float32" in told.value.hint
    assert built(keeping(names), header, torch.float32).span == BlockSpan(1, 2)


@pytest.mark.parametrize("names", [None, [], ["rope"], ["norm"]], ids=str)
def test_names_that_no_module_has_keep_nothing(header: CheckpointHeader, names: Any) -> None:
    assert built(keeping(names), header, torch.bfloat16).span == BlockSpan(1, 2)


TENSORS: dict[str, Callable[[Any], None]] = {
    "a buffer": lambda block: block.register_buffer("kept", torch.ones(2)),
    "a buffer that is not saved": lambda block: block.register_buffer("kept", torch.ones(2), persistent=False),
    "an attribute": lambda block: setattr(block, "kept", torch.ones(2)),
    "tensors in a list": lambda block: setattr(block, "kept", [torch.ones(2)]),
    "tensors in a dictionary": lambda block: setattr(block, "kept", {"cos": (torch.ones(2),)}),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_that_is_no_parameter_is_refused(header: CheckpointHeader, kind: str) -> None:
    def change(model: Any) -> None:
        TENSORS[kind](model.transformer_blocks[0])

    with pytest.raises(CheckpointUnrecognised, match=r"holds transformer_blocks\.0\.kept, a tensor that is no param"):
        built(change, header, torch.float32)


@pytest.mark.parametrize("kind", TENSORS)
def test_it_is_refused_before_anything_is_read_where_the_adapter_describes_its_parameters(
    kind: str, tmp_path: Path
) -> None:
    def skeleton() -> nn.Module:
        model = nn.Sequential(nn.Linear(2, 2))
        TENSORS[kind](model[0])
        return model

    with pytest.raises(CheckpointUnrecognised, match=r"holds 0\.kept, a tensor that is no parameter"):
        describe_parameters(
            CheckpointHeader(tmp_path, {}), skeleton, lambda name, rows: (Piece(name),), lambda name: BlockSpan(0, 1)
        )
