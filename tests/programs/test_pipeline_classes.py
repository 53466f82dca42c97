"""Pipelines whose class has a transformer by default are split all the same, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import pytest
import torch
from diffusers import Flux2KleinPipeline

import mesh_core
from mesh_core.builtin import load_plugins
from mesh_core.errors import ConfigError
from mesh_core.programs.generate import generate
from tests.adapters import tiny
from tests.support import pipelines
from tests.support.workers import thread_workers


class DefaultPipeline(Flux2KleinPipeline):  # type: ignore[misc]
    """As Wan's is: the transformer is a component that may be left out."""

    _optional_components: ClassVar[list[str]] = ["transformer"]

    def __init__(
        self, scheduler: Any, vae: Any, text_encoder: Any, tokenizer: Any, transformer: Any = None,
        is_distilled: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer, is_distilled)


class StubbornPipeline(Flux2KleinPipeline):  # type: ignore[misc]
    """Has a transformer of its own, whatever it is given."""

    def __init__(
        self, scheduler: Any, vae: Any, text_encoder: Any, tokenizer: Any, transformer: Any, is_distilled: bool = False
    ) -> None:
        own = tiny.transformer(guidance=False)
        super().__init__(scheduler, vae, text_encoder, tokenizer, own, is_distilled)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for kind in (DefaultPipeline, StubbornPipeline):
        monkeypatch.setattr(diffusers, kind.__name__, kind, raising=False)
    pipelines.save(tmp_path / "klein")
    yield tmp_path / "klein"


def named(folder: Path, kind: type[Any]) -> None:
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("Flux2KleinPipeline", kind.__name__))


def test_a_transformer_that_may_be_left_out_is_split(folder: Path, tmp_path: Path) -> None:
    expected = pipelines.run(Flux2KleinPipeline.from_pretrained(folder, dtype=torch.bfloat16))
    named(folder, DefaultPipeline)
    plugins = load_plugins()
    with thread_workers(folder.parent, 1, "inproc", plugins=plugins) as (worker,):
        options: dict[str, Any] = {"local": ":1", "workers": [worker.address], "device": "cpu", "plugins": plugins}
        pipeline = mesh_core.load_pipeline(folder, **options)
        assert type(pipeline) is DefaultPipeline
        assert torch.equal(pipelines.run(pipeline), expected)
        assert len(pipeline.transformer.mesh.stats.steps) == 2, "the steps ran on the worker"
        pipeline.transformer.mesh.close()
        wanted = {n: v for n, v in pipelines.CALL.items() if n not in ("prompt", "output_type")}
        file, stats = generate(folder, "a red fox", wanted, seed=3, output=tmp_path / "fox.png", **options)
    assert file.is_file() and len(stats.steps) == 2


def test_a_pipeline_that_takes_another_transformer_is_refused(folder: Path) -> None:
    named(folder, StubbornPipeline)
    with pytest.raises(ConfigError, match="StubbornPipeline does not use the transformer that it is given") as told:
        mesh_core.load_pipeline(folder, local=":", device="cpu", plugins=load_plugins())
    assert "split()" in told.value.hint


def test_a_pipeline_that_diffusers_does_not_have_is_refused(folder: Path) -> None:
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("Flux2KleinPipeline", "NoSuchPipeline"))
    with pytest.raises(ConfigError, match="has no pipeline 'NoSuchPipeline'"):
        mesh_core.load_pipeline(folder, local=":", device="cpu", plugins=load_plugins())
