"""A model in memory is its file's only where every weight that workers compute with says so; else it is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline
from torch import nn

import mesh_core
from mesh_core.builtin import load_plugins
from mesh_core.errors import (
    CheckpointChanged,
    CheckpointMismatch,
    CheckpointUnrecognised,
    ConfigError,
    UnsupportedInput,
)
from mesh_core.plugins.registry import Plugins
from tests.adapters import tiny
from tests.support import loras, pipelines
from tests.support.workers import ThreadWorker, thread_workers

Change = Callable[[Any], Any]


@dataclass
class Rig:
    """A pipeline on disk in float32, and a worker that has it."""

    folder: Path
    plugins: Plugins
    workers: list[ThreadWorker]

    def whole(self) -> Any:
        return Flux2KleinPipeline.from_pretrained(self.folder, dtype=torch.bfloat16)

    def split(self, pipeline: Any, local: str = ":2") -> Any:
        return mesh_core.split(pipeline, local=local, workers=[self.workers[0].address], plugins=self.plugins)

    def load(self, folder: Path, local: str) -> Any:
        workers = [self.workers[0].address]
        return mesh_core.load_pipeline(folder, local=local, workers=workers, device="cpu", plugins=self.plugins)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder, plugins = tmp_path_factory.mktemp("models"), load_plugins()
    pipelines.save(folder / "klein", dtype=torch.float32)
    with thread_workers(folder, 1, "inproc", plugins=plugins) as workers:
        yield Rig(folder / "klein", plugins, workers)


REMOTE = "single_transformer_blocks.2.attn.to_out"
LOCAL = "transformer_blocks.0.attn.to_q"


def one_bit(model: Any) -> None:
    model.get_parameter(f"{REMOTE}.weight").data.view(torch.int16)[0, 0] ^= 1


def a_zero_of_the_other_sign(model: Any) -> None:
    weight = model.get_parameter(f"{REMOTE}.weight").data
    weight.view(torch.int16)[0, 0] ^= -(2**15)


def a_scaled_block(model: Any) -> None:
    for parameter in model.single_transformer_blocks[2].parameters():
        parameter.data *= 1.02


def rounded_to_int8(model: Any) -> None:
    weight = model.get_parameter(f"{REMOTE}.weight").data
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    weight.copy_((weight / step).round() * step)


def a_fused_lora(model: Any) -> None:
    shapes = {name: shape for name, shape in loras.modules(model).items() if name == REMOTE}
    model.load_lora_adapter(loras.peft(shapes), prefix="transformer")
    model.fuse_lora()
    model.unload_lora()


def test_a_file_in_float32_is_the_model_that_was_loaded_in_bfloat16(rig: Rig) -> None:
    expected = pipelines.run(rig.whole())
    pipeline = rig.split(rig.whole())
    assert pipeline.transformer.mesh.session.identity.spec.dtypes == ("F32",)
    assert torch.equal(pipelines.run(pipeline), expected)
    rig.split(pipeline, ":4")
    assert torch.equal(pipelines.run(pipeline), expected)
    mesh_core.unsplit(pipeline)


@pytest.mark.parametrize(
    "change",
    [one_bit, a_zero_of_the_other_sign, a_scaled_block, rounded_to_int8, a_fused_lora],
    ids=lambda f: f.__name__,
)
def test_weights_that_were_changed_in_memory_are_refused_by_name(rig: Rig, change: Change) -> None:
    pipeline = rig.whole()
    change(pipeline.transformer)
    expected = pipelines.run(pipeline)
    with pytest.raises(CheckpointMismatch, match=r"single_transformer_blocks\.2\..* is not what .*transformer") as told:
        rig.split(pipeline)
    assert "loras=" in told.value.hint
    assert torch.equal(pipelines.run(pipeline), expected), "it is as it was"


def test_a_change_of_what_stays_here_is_part_of_the_picture(rig: Rig) -> None:
    pipeline = rig.whole()
    pipeline.transformer.get_parameter(f"{LOCAL}.weight").data *= 1.5
    expected = pipelines.run(pipeline)
    assert not torch.equal(expected, pipelines.run(rig.whole()))
    rig.split(pipeline)
    assert torch.equal(pipelines.run(pipeline), expected)
    with pytest.raises(CheckpointMismatch, match=r"transformer_blocks\.0\.attn\.to_q\.weight"):
        rig.split(pipeline, ":0")
    assert torch.equal(pipelines.run(pipeline), expected)
    mesh_core.unsplit(pipeline)


def test_blocks_of_a_loaded_pipeline_that_were_changed_here_do_not_become_remote(rig: Rig) -> None:
    pipeline = rig.load(rig.folder, ":2")
    pipeline.transformer.get_parameter("transformer_blocks.1.attn.to_q.weight").data *= 1.5
    expected = pipelines.run(pipeline)
    with pytest.raises(CheckpointMismatch, match=r"transformer_blocks\.1\.attn\.to_q\.weight"):
        rig.split(pipeline, ":1")
    assert torch.equal(pipelines.run(pipeline), expected)
    rig.split(pipeline, ":3")
    assert torch.equal(pipelines.run(pipeline), expected)
    mesh_core.unsplit(pipeline)


class Packed(torch.Tensor):
    """Like torchao's tensors: says that it is bfloat16, and does what it knows only."""

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16)  # type: ignore[attr-defined]

    def __init__(self, data: torch.Tensor) -> None:
        self.packed = data

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].packed)
        raise NotImplementedError(f"{func} of a packed tensor")


class Params4bit(nn.Parameter):
    """Like bitsandbytes' and GGUF's parameters: bytes."""


def with_weight(make: Callable[[torch.Tensor], Any]) -> Change:
    def change(model: Any) -> None:
        module = model.get_submodule(REMOTE)
        module._parameters["weight"] = make(module.weight.data)

    return change


def with_a_buffer_beside_it(model: Any) -> None:
    model.get_submodule(REMOTE).register_buffer("extra", torch.ones(1))


def with_another_parameter(model: Any) -> None:
    model.get_submodule(REMOTE).extra = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_weight(lambda w: nn.Parameter(Packed(w), requires_grad=False)), "to_out.weight is a Packed"),
        (with_weight(lambda w: Params4bit(w.to(torch.uint8), requires_grad=False)), "to_out.weight is a Params4bit"),
        (with_weight(lambda w: nn.Parameter(w.to(torch.int8), requires_grad=False)), "to_out.weight as I8"),
        (
            with_weight(lambda w: nn.Parameter(w.to(torch.float8_e4m3fn), requires_grad=False)),
            "to_out.weight is held as torch",
        ),
        (with_weight(lambda w: nn.Parameter(w.to("meta"), requires_grad=False)), "to_out.weight holds no data"),
        (with_a_buffer_beside_it, "to_out.extra beside the weights of that layer"),
        (with_another_parameter, "to_out.extra beside the weights of that layer"),
    ],
    ids=["a subclass", "4 bit", "int8", "fp8", "offloaded", "a buffer", "a parameter"],
)
def test_what_workers_cannot_compute_with_is_refused_by_name(rig: Rig, change: Change, says: str) -> None:
    pipeline = rig.whole()
    change(pipeline.transformer)
    kind = type(pipeline.transformer)
    with pytest.raises(CheckpointUnrecognised, match=says) as told:
        rig.split(pipeline)
    assert told.value.hint and type(pipeline.transformer) is kind


def test_a_split_model_takes_no_other_weights(rig: Rig) -> None:
    pipeline = rig.split(rig.whole())
    with pytest.raises(UnsupportedInput, match="takes no other weights"):
        pipeline.transformer.load_state_dict(pipeline.transformer.state_dict())
    mesh_core.unsplit(pipeline)


def test_a_pipeline_without_a_transformer_is_refused(rig: Rig) -> None:
    with pytest.raises(ConfigError, match="holds no transformer"):
        rig.split(type("Other", (), {})())


@pytest.fixture
def moving(rig: Rig, tmp_path: Path) -> Iterator[Any]:
    copytree(rig.folder, tmp_path / "klein")
    pipeline = rig.load(tmp_path / "klein", ":2")
    yield pipeline
    if hasattr(pipeline.transformer, "mesh"):
        pipeline.transformer.mesh.close()


@pytest.mark.parametrize(
    "then", [lambda r, p: r.split(p, ":3"), lambda r, p: mesh_core.unsplit(p)], ids=["cut", "unsplit"]
)
def test_blocks_are_not_read_from_a_file_that_became_another(
    rig: Rig, moving: Any, tmp_path: Path, then: Callable[[Rig, Any], Any]
) -> None:
    expected = pipelines.run(moving)
    tiny.transformer(guidance=False, seed=5).save_pretrained(tmp_path / "klein" / "transformer")
    with pytest.raises(CheckpointChanged, match="other weights than when this pipeline was loaded"):
        then(rig, moving)
    assert torch.equal(pipelines.run(moving), expected)


def test_a_file_that_was_copied_over_itself_is_the_same(rig: Rig, moving: Any, tmp_path: Path) -> None:
    expected = pipelines.run(moving)
    (file,) = (tmp_path / "klein" / "transformer").glob("*.safetensors")
    file.write_bytes(file.read_bytes())
    rig.split(moving, ":3")
    assert torch.equal(pipelines.run(moving), expected)
    mesh_core.unsplit(rig.split(moving, ":4"))
