"""Variants of weights beside the plain ones: what is asked for is what runs, here and on workers, as in diffusers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import Flux2KleinPipeline

import mesh_core
from mesh_core.builtin import installed_plugins
from mesh_core.cli import FAILED, cli
from mesh_core.errors import CheckpointUnrecognised
from tests.adapters import tiny
from tests.support import pipelines
from tests.support.workers import ThreadWorker, thread_workers

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain weights, and of the transformer two variants with other values: one in a file, one in shards."""
    folder = tmp_path_factory.mktemp("models") / "klein"
    pipelines.save(folder)
    for seed, (variant, shard) in enumerate({"fp16": "1GB", "ema": "100KB"}.items(), 1):
        model = tiny.transformer(guidance=False, seed=seed, dtype=torch.float16)
        model.save_pretrained(folder / "transformer", variant=variant, max_shard_size=shard)
    whole = Flux2KleinPipeline.from_pretrained(folder)
    whole.vae.save_pretrained(folder / "vae", variant="fp16")
    return folder


@pytest.fixture(scope="module")
def worker(folder: Path) -> Iterator[ThreadWorker]:
    installed_plugins.cache_clear()
    with thread_workers(folder.parent, 1, plugins=installed_plugins()) as (worker,):
        yield worker


def test_the_folder_is_as_diffusers_writes_it(folder: Path) -> None:
    names = {file.name for file in (folder / "transformer").iterdir()}
    assert {"diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"} < names
    assert "diffusion_pytorch_model.safetensors.index.ema.json" in names


@pytest.mark.parametrize("variant", [None, "fp16", "ema"])
def test_the_transformer_is_that_of_the_variant(folder: Path, worker: ThreadWorker, variant: str | None) -> None:
    expected = pipelines.run(Flux2KleinPipeline.from_pretrained(folder, variant=variant, dtype=torch.float32))
    options: dict[str, Any] = {"variant": variant, "workers": worker.address, "device": "cpu", "torch_dtype": "float32"}
    pipeline = mesh_core.load_pipeline(folder, local=":1", **options)
    try:
        assert torch.equal(pipelines.run(pipeline), expected)
        assert len(pipeline.transformer.mesh.stats.steps) == 2
        mesh_core.split(pipeline, local=":3", workers=worker.address)
        assert torch.equal(pipelines.run(pipeline), expected), "what becomes local is read from the variant"
    finally:
        mesh_core.unsplit(pipeline)
    assert torch.equal(pipelines.run(pipeline), expected)


def test_its_own_type_is_that_of_the_variants_file(folder: Path) -> None:
    for variant, dtype in ((None, torch.bfloat16), ("fp16", torch.float16)):
        pipeline = mesh_core.load_pipeline(folder, variant=variant, local=":", device="cpu")
        assert pipeline.transformer.dtype == pipeline.vae.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_loaded_variant_is_split_over_workers_that_have_it(
    folder: Path, worker: ThreadWorker, dtype: torch.dtype
) -> None:
    pipeline = Flux2KleinPipeline.from_pretrained(folder, variant="fp16", dtype=dtype)
    with torch.no_grad():
        given = tiny.inputs(guidance=False, dtype=dtype)
        expected = pipeline.transformer(**given).sample
        mesh_core.split(pipeline, local=":1", workers=worker.address)
        assert torch.equal(pipeline.transformer(**given).sample, expected)
    mesh_core.unsplit(pipeline)


def test_a_worker_lists_the_plain_weights_and_each_variant(worker: ThreadWorker) -> None:
    names = [entry["name"] for entry in worker.worker.library.catalogue()]
    assert sorted(names) == ["klein", "klein (ema)", "klein (fp16)"]


def test_a_variant_that_no_component_has_is_refused_and_says_which_there_are(folder: Path) -> None:
    with pytest.raises(CheckpointUnrecognised, match=r"no weights of the variant 'fp8'.*plain ones, 'ema', 'fp16'"):
        mesh_core.load_pipeline(folder, variant="fp8", local=":", device="cpu")
    with pytest.raises(ValueError, match="variant=fp8"):
        Flux2KleinPipeline.from_pretrained(folder, variant="fp8")


def test_a_component_without_the_variant_is_taken_as_it_is(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "klein"
    shutil.copytree(folder, copy)
    for file in (copy / "transformer").glob("*.fp16.*"):
        file.unlink()
    expected = pipelines.run(Flux2KleinPipeline.from_pretrained(copy, variant="fp16", dtype=torch.bfloat16))
    pipeline = mesh_core.load_pipeline(copy, variant="fp16", local=":", device="cpu")
    assert torch.equal(pipelines.run(pipeline), expected)


@pytest.mark.parametrize(
    "name",
    [
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "transformer/config.json",
        "model_index.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
    ],
)
def test_a_pointer_of_git_lfs_is_called_one(folder: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "klein"
    shutil.copytree(folder, copy)
    (copy / name).write_text(POINTER)
    with pytest.raises(CheckpointUnrecognised, match="pointer of Git LFS") as told:
        mesh_core.load_pipeline(copy, variant="fp16", local=":", device="cpu")
    assert str(copy / name) in told.value.message and "git lfs pull" in told.value.hint


def test_pointers_that_are_not_asked_for_disturb_nobody(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "klein"
    shutil.copytree(folder, copy)
    for name in ("transformer", "vae"):
        (copy / name / "diffusion_pytorch_model.fp16.safetensors").write_text(POINTER)
    mesh_core.load_pipeline(copy, local=":", device="cpu")


def test_the_command_line_draws_with_a_variant(folder: Path, worker: ThreadWorker, tmp_path: Path) -> None:
    def generate(*options: object) -> tuple[int, str]:
        size = ("--width", 32, "--height", 32, "--steps", 1, "--device", "cpu", "--local", ":")
        result = CliRunner().invoke(cli, [str(a) for a in ("generate", folder, "a fox", *size, *options)])
        return result.exit_code, result.output

    code, said = generate("--variant", "fp8", "-o", tmp_path / "x.png")
    assert code == FAILED and "--variant ema" in said
