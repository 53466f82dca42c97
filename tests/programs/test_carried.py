"""What a model holds besides parameters in one type goes along: tables that its class computes, modules in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

import mesh_core
from mesh_core.errors import CheckpointMismatch, CheckpointUnrecognised, UnsupportedInput
from mesh_core.plugins.registry import Plugins
from tests.support import pipelines
from tests.support.families import chroma, plugins_with, wan
from tests.support.split_klein import SplitKlein, run_split
from tests.support.workers import ThreadWorker, thread_workers

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),
]
BF16 = torch.bfloat16
LEFT_OUT: dict[str, Any] = {"vae": None, "text_encoder": None, "tokenizer": None}


@dataclass
class Family:
    """A pipeline of which all but the transformer is left out; its file is in float32."""

    folder: Path
    inputs: dict[str, Any]
    kind: Any
    model_class: Any
    blocks: int
    plugins: Plugins
    workers: list[ThreadWorker]

    def whole(self, dtype: torch.dtype = BF16) -> Any:
        return self.around(self.model_class.from_pretrained(self.folder / "transformer", torch_dtype=dtype))

    def around(self, model: Any) -> Any:
        return self.kind(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), **LEFT_OUT)

    def split(self, pipeline: Any, local: str = ":1") -> Any:
        return mesh_core.split(
            pipeline, local=local, workers=[self.workers[0].address], plugins=self.plugins, quality="lossless"
        )

    def load(self, local: str = ":1", dtype: torch.dtype = BF16) -> Any:
        workers = [self.workers[0].address]
        return mesh_core.load_pipeline(
            self.folder, local=local, workers=workers, plugins=self.plugins, device="cpu", dtype=dtype, **LEFT_OUT
        )

    def run(self, pipeline: Any) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = pipeline.transformer(**self.inputs, return_dict=False)[0]
        return result


@pytest.fixture(scope="module", params=["wan", "chroma"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    folder, plugins = tmp_path_factory.mktemp("models"), plugins_with(wan.WanAdapter(), chroma.ChromaAdapter())
    module: Any = wan if request.param == "wan" else chroma
    kind, model_class = {
        "wan": (WanPipeline, WanTransformer3DModel),
        "chroma": (ChromaPipeline, ChromaTransformer2DModel),
    }[request.param]
    made = module.save(folder / "alone")
    with thread_workers(folder, 1, "inproc", plugins=plugins) as workers:
        found = Family(
            folder / "pipeline",
            module.inputs(BF16),
            kind,
            model_class,
            3 if module is wan else 4,
            plugins,
            workers,
        )
        found.around(model_class.from_pretrained(made)).save_pretrained(found.folder)
        yield found


@pytest.fixture(scope="module")
def expected(family: Family) -> torch.Tensor:
    return family.run(family.whole())


def types(model: Any) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


def test_every_cut_gives_the_bits_of_the_whole_model(family: Family, expected: torch.Tensor) -> None:
    whole = family.whole()
    before = types(whole.transformer)
    for cut in [*range(family.blocks + 1), 1]:
        family.split(whole, f":{cut}")
        assert torch.equal(family.run(whole), expected), cut
        assert types(whole.transformer) == before
    mesh_core.unsplit(whole)
    assert torch.equal(family.run(whole), expected) and types(whole.transformer) == before


def test_loading_is_as_diffusers_loads_it(family: Family, expected: torch.Tensor) -> None:
    before = types(family.whole().transformer)
    loaded = family.load()
    assert torch.equal(family.run(loaded), expected)
    assert types(loaded.transformer) == before
    for local in (":2", ":0"):
        family.split(loaded, local)
        assert torch.equal(family.run(loaded), expected), local
    loaded.to("cpu")
    assert torch.equal(family.run(loaded), expected)
    mesh_core.unsplit(loaded)
    assert torch.equal(family.run(loaded), expected)
    held = dict(family.whole().transformer.named_buffers())
    assert all(torch.equal(b, held[n]) and b.dtype == held[n].dtype for n, b in loaded.transformer.named_buffers())
    assert types(loaded.transformer) == before


def test_what_was_cast_after_loading_is_as_it_is_in_memory(family: Family, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = family.whole(torch.float32)
    pipeline.transformer.to(BF16)
    assert {t.dtype for t in (*pipeline.transformer.parameters(), *pipeline.transformer.buffers())} == {BF16}
    here = family.run(pipeline)
    family.split(pipeline)
    assert torch.equal(family.run(pipeline), here)
    mesh_core.unsplit(pipeline)


def test_a_changed_table_is_refused_by_name(family: Family) -> None:
    pipeline = family.whole()
    name, table = next(iter(pipeline.transformer.named_buffers()))
    table[0] += 1
    with pytest.raises(CheckpointMismatch, match=rf"holds {name}, which is no parameter"):
        family.split(pipeline)
    owner, _, leaf = name.rpartition(".")
    delattr(pipeline.transformer.get_submodule(owner), leaf)
    with pytest.raises(CheckpointUnrecognised, match=rf"{name}, which a \w+ computes when it is made, is not in"):
        family.split(pipeline)


def test_a_split_model_keeps_its_types(family: Family, expected: torch.Tensor) -> None:
    loaded = family.load()
    with pytest.raises(UnsupportedInput, match=r"holds torch\.float32 beside torch\.bfloat16"):
        loaded.transformer.to(BF16)
    assert torch.equal(family.run(loaded), expected)
    mesh_core.unsplit(loaded)


def test_norms_that_were_put_into_float32_by_hand_are_so_on_workers(klein: SplitKlein) -> None:
    pipeline = klein.whole()
    pipeline.transformer.single_transformer_blocks[1].attn.norm_q.float()
    pipeline.transformer.transformer_blocks[0].attn.norm_k.float()
    expected = pipelines.run(pipeline)
    klein.split(pipeline)
    assert torch.equal(run_split(pipeline), expected)
    klein.split(pipeline, ":3")
    assert torch.equal(run_split(pipeline), expected)
    mesh_core.unsplit(pipeline)
    assert torch.equal(pipelines.run(pipeline), expected)
