"""A stage has what the model's class has: buffers of the checkpoint, tables that the class computes, kept float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import ChromaTransformer2DModel, QwenImageTransformer2DModel, WanTransformer3DModel
from safetensors.torch import save_file
from torch import nn

from mesh_core.errors import CheckpointCorrupt, CheckpointMismatch, CheckpointUnrecognised
from mesh_core.model import fingerprint
from mesh_core.model.adapting import describe_parameters
from mesh_core.model.checkpoint import CheckpointHeader, read_header
from mesh_core.model.constructing import as_loaded, hashes, without_weights
from mesh_core.model.numerics import Numerics
from mesh_core.model.pool import ParameterPool
from mesh_core.model.spans import BlockSpan
from mesh_core.model.spec import ModelSpec, ParameterSpec, Piece
from mesh_core.model.tensors import computed_tensors, kept_in_float32, stored_tensors
from mesh_core.model.weights import WeightReader
from mesh_klein import KleinAdapter
from tests.adapters import tiny

CPU, BF16 = torch.device("cpu"), torch.bfloat16
Change = Callable[[Any], None]


class Family(KleinAdapter):
    """Klein, but for something that its model class has besides."""

    def __init__(self, change: Change) -> None:
        self.change = change

    def skeleton(self, spec: ModelSpec) -> nn.Module:
        model = super().skeleton(spec)
        self.change(model)
        return model


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> CheckpointHeader:
    return read_header(tiny.saved(tmp_path_factory.mktemp("models") / "klein", doubles=1, singles=1))


def built(change: Change, header: CheckpointHeader, numerics: Numerics) -> Any:
    adapter = Family(change)
    spec = adapter.recognise(header)
    assert spec is not None
    return adapter.build_stage(spec, BlockSpan(1, 2), WeightReader(header), device=CPU, numerics=numerics)


def keeping(names: Any) -> Any:
    model = tiny.transformer(guidance=False, doubles=1, singles=1)
    model.__class__ = type("Keeping", (type(model),), {"_keep_in_fp32_modules": names})
    return model


@pytest.mark.parametrize("names", [["norm_out"], "norm_out", {"rope", "norm_out"}], ids=str)
def test_modules_that_a_class_names_stay_in_float32_where_the_rest_is_less(names: Any) -> None:
    model = keeping(names)
    for dtype in (BF16, torch.float16):
        assert kept_in_float32(model, dtype) == (("norm_out.linear.weight", torch.float32),)
    assert kept_in_float32(model, torch.float32) == ()


@pytest.mark.parametrize("names", [None, [], ["rope"], ["norm"]], ids=str)
def test_names_that_no_module_has_keep_nothing(names: Any) -> None:
    assert kept_in_float32(keeping(names), BF16) == ()


def test_a_stage_holds_each_parameter_in_its_type(header: CheckpointHeader) -> None:
    numerics = Numerics(BF16, (("norm_out.linear.weight", torch.float32),))
    stage = built(lambda model: None, header, numerics)
    types = {name: p.dtype for name, p in stage.model.named_parameters() if not p.is_meta}
    assert types.pop("norm_out.linear.weight") is torch.float32 and set(types.values()) == {BF16}


COMPUTED: dict[str, Change] = {
    "a buffer that is not saved": lambda block: block.register_buffer("kept", torch.ones(2) * 3, persistent=False),
    "an attribute": lambda block: setattr(block, "kept", torch.ones(2) * 3),
    "tensors in a list": lambda block: setattr(block, "kept", [torch.ones(2) * 3]),
    "tensors in a dictionary": lambda block: setattr(block, "kept", {"cos": (torch.ones(2) * 3,)}),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_tensor_that_the_class_computes_is_in_the_stage(header: CheckpointHeader, kind: str) -> None:
    def change(model: Any) -> None:
        COMPUTED[kind](model.transformer_blocks[0])

    for dtype in (torch.float32, BF16):
        [(name, table)] = computed_tensors(built(change, header, Numerics(dtype)).model).items()
        assert name.startswith("transformer_blocks.0.kept")
        assert table.dtype == dtype and table.tolist() == [3, 3]
    with pytest.raises(CheckpointMismatch, match=r"holds transformer_blocks\.0\.kept\S*, which is no parameter"):
        built(change, header, Numerics(BF16, computed=((name, "0" * 64),)))
    with pytest.raises(CheckpointMismatch, match=r"holds transformer_blocks\.0\.kept"):
        built(change, header, Numerics(BF16, computed=()))
    with pytest.raises(CheckpointMismatch, match=r"holds rope\.freqs"):
        built(lambda model: None, header, Numerics(BF16, computed=(("rope.freqs", "0" * 64),)))


LOST: dict[str, Change] = {
    "memory that nothing fills": lambda block: setattr(block, "kept", torch.empty(2)),
    "a parameter in another place": lambda block: setattr(block, "kept", [block.attn.to_q.weight]),
}


@pytest.mark.parametrize("kind", LOST)
def test_a_tensor_that_cannot_be_computed_is_refused(header: CheckpointHeader, kind: str) -> None:
    with pytest.raises(
        CheckpointUnrecognised, match=r"holds transformer_blocks\.0\.kept\S*, a tensor that is no param"
    ):
        built(lambda model: LOST[kind](model.transformer_blocks[0]), header, Numerics(torch.float32))


def test_a_persistent_buffer_that_the_checkpoint_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointCorrupt, match="lacks running_mean"):
        described(CheckpointHeader(tmp_path, {}), lambda: nn.BatchNorm1d(2, affine=False))


class Buffered(nn.Module):
    """A parameter, and a persistent buffer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2, 3))
        self.register_buffer("table", torch.rand(4, 2))
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("step", torch.tensor(7))


def described(header: CheckpointHeader, skeleton: Callable[[], nn.Module]) -> dict[str, ParameterSpec]:
    return describe_parameters(header, skeleton, lambda name, rows: (Piece(name),), lambda name: BlockSpan(0, 1))


def test_persistent_buffers_are_read_shared_and_hashed_as_parameters_are(tmp_path: Path) -> None:
    original = Buffered()
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    header = read_header(tmp_path / "model.safetensors")
    spec = ModelSpec("test", "", {}, ("block",), ({}, {}), {}, described(header, Buffered))
    assert spec.parameters.keys() == original.state_dict().keys()

    numerics, pool = Numerics(BF16, (("weight", torch.float32),)), ParameterPool()
    read = [without_weights(Buffered, BF16) for _ in range(2)]
    for model in read:
        assert all(t.is_meta for t in stored_tensors(model).values())
        WeightReader(header, model="it", pool=pool).fill(model, spec.parameters, device=CPU, numerics=numerics)
    for name, tensor in original.state_dict().items():
        held = stored_tensors(read[0])[name]
        wanted = BF16 if name == "table" else tensor.dtype
        assert held.dtype == wanted and torch.equal(held, tensor.to(wanted)), name
        assert held is stored_tensors(read[1])[name]
    assert pool.nbytes(CPU) == sum(t.nbytes for t in stored_tensors(read[0]).values())
    assert pool.nbytes(CPU) == sum(numerics.nbytes(name, p) for name, p in spec.parameters.items())

    assert fingerprint.of_checkpoint(header, spec) == fingerprint.of_model(spec, original)
    original.get_buffer("order")[0] = 1
    assert fingerprint.of_checkpoint(header, spec) != fingerprint.of_model(spec, original)


class Tables(nn.Module):
    """Expressions whose result depends on torch's default type, and some whose does not."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = {
            "thirds": torch.arange(4) / 3,
            "frequencies": 1.0 / (10000 ** (torch.arange(0, 8, 2) / 8)),
            "tenths": torch.arange(6) * 0.1,
            "outer": torch.outer(torch.linspace(0, 1, 5), torch.full((3,), 0.7)),
            "sine": torch.arange(9).sin(),
            "chosen": torch.where(torch.tensor([True, False]), 0.3, 0.1),
            "given": torch.tensor([1.1, 2.2]),
            "steps": torch.arange(0, 1, 0.3),
            "own type": torch.arange(3).float() / 7,
            "named type": torch.arange(3, dtype=torch.float32) / 7,
            "converted": torch.arange(3).to(torch.float64) / 7,
            "joined": torch.cat([torch.ones(2) / 3, torch.zeros(1)]),
            "whole": torch.arange(3) * 2,
        }


CLASSES: dict[str, Callable[[], nn.Module]] = {
    "Tables": Tables,
    "Chroma": lambda: ChromaTransformer2DModel(num_layers=1, num_single_layers=1, num_attention_heads=2),
    "Wan": lambda: WanTransformer3DModel(num_layers=1, num_attention_heads=2, ffn_dim=8),
    "Qwen-Image": lambda: QwenImageTransformer2DModel(num_layers=1, num_attention_heads=2),
}


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_what_a_class_computes_equals_what_diffusers_holds_after_loading(name: str, dtype: torch.dtype) -> None:
    make = CLASSES[name]
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights():
            loaded = make()
    finally:
        torch.set_default_dtype(torch.float32)
    expected = hashes(computed_tensors(loaded))
    assert expected, "nothing to compare"
    model = without_weights(make, dtype)
    assert hashes(computed_tensors(model)) == expected
    assert all(tensor.is_meta for tensor in stored_tensors(model).values())
    assert dict(as_loaded(Numerics(dtype), make).computed or ()) == expected


def test_torchs_default_type_stays_what_it_is_for_other_threads() -> None:
    seen = []

    def make() -> nn.Module:
        seen.append(torch.get_default_dtype())
        return Tables()

    without_weights(make, BF16)
    assert set(seen) == {torch.float32}
