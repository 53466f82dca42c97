"""Pipelines with quantised transformers: from a single file, and those that diffusers quantised in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel, GGUFQuantizationConfig

import mesh_core
from benchmarks.quantise.kinds import WRITERS
from benchmarks.quantise.original import original
from mesh_core.builtin import installed_plugins
from mesh_core.errors import CheckpointMismatch, CheckpointUnrecognised, ConfigError
from mesh_core.model.stored_weight import StoredWeight
from tests.support.workers import ThreadWorker, mesh_home, thread_workers

TRAINED = Path(__file__).parents[2] / "examples" / "tiny-klein" / "model"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return WRITERS["Q4_K"](original(TRAINED)[1], tmp_path_factory.mktemp("files") / "klein", {})


@pytest.fixture(scope="module")
def worker(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadWorker]:
    with mesh_home(tmp_path_factory.mktemp("home")), thread_workers(file, 1, plugins=installed_plugins()) as (one,):
        yield one


def draw(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "generator": noise, "output_type": "pt"}
    images: torch.Tensor = pipeline(prompt="fox", guidance_scale=1.0, **call).images
    return images


def in_memory(file: Path) -> Any:
    """The pipeline as diffusers alone loads it, its linear layers made for GGUF."""
    config = GGUFQuantizationConfig(compute_dtype=torch.bfloat16)
    transformer = Flux2Transformer2DModel.from_single_file(
        str(file), quantization_config=config, config=str(TRAINED / "transformer"), torch_dtype=torch.bfloat16
    )
    return Flux2KleinPipeline.from_pretrained(TRAINED, transformer=transformer, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def expected(file: Path) -> torch.Tensor:
    return draw(in_memory(file))


def test_a_single_file_draws_what_diffusers_alone_draws(
    file: Path, worker: ThreadWorker, expected: torch.Tensor
) -> None:
    pipeline = mesh_core.load_pipeline(file, components=TRAINED, local=":4", workers=[worker.address], device="cpu")
    assert torch.equal(draw(pipeline), expected)
    for cut in (":0", ":9"):
        mesh_core.split(pipeline, local=cut, workers=[worker.address])
        assert torch.equal(draw(pipeline), expected)
    mesh_core.unsplit(pipeline)
    assert torch.equal(draw(pipeline), expected)
    assert isinstance(pipeline.transformer.transformer_blocks[0].attn.to_q.weight, StoredWeight)
    mesh_core.split(pipeline, local=":2", workers=[worker.address])
    assert torch.equal(draw(pipeline), expected)
    pipeline.transformer.mesh.close()


def test_what_diffusers_quantised_is_split_and_put_together_again(
    file: Path, worker: ThreadWorker, expected: torch.Tensor
) -> None:
    pipeline = in_memory(file)
    with pytest.raises(CheckpointMismatch):
        # diffusers cast the norms and forgot the file.
        mesh_core.split(pipeline, local=":3", workers=[worker.address])
    for cut in (":3", ":0", ":8"):
        mesh_core.split(pipeline, local=cut, workers=[worker.address], source=file)
        assert torch.equal(draw(pipeline), expected)
    mesh_core.unsplit(pipeline)
    assert torch.equal(draw(pipeline), expected)


def test_layers_that_compute_in_another_type_are_refused(file: Path, worker: ThreadWorker) -> None:
    pipeline = in_memory(file)
    pipeline.transformer.transformer_blocks[0].attn.to_q.compute_dtype = torch.float32
    with pytest.raises(mesh_core.UnsupportedInput, match=r"to_q computes in torch\.float32"):
        mesh_core.split(pipeline, local=":3", workers=[worker.address], source=file)


def test_a_single_file_needs_its_own_pipelines_folder(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--components FOLDER"):
        mesh_core.load_pipeline(file)
    with pytest.raises(ConfigError, match="has no model_index"):
        mesh_core.load_pipeline(file, components=tmp_path)
    for part in TRAINED.rglob("*.json"):
        target = tmp_path / part.relative_to(TRAINED)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = part.read_text(encoding="utf-8")
        if part.parent.name == "transformer":
            text = text.replace('"num_layers": 4', '"num_layers": 5')
        target.write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointUnrecognised, match=r"is another model than the one in .*: num_layers is 4"):
        mesh_core.load_pipeline(file, components=tmp_path)
