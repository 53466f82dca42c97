"""The script host on tiny-klein: a split pipeline gives the uncut pipeline's picture, and is reversible."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline

import mesh_core
from mesh_core.errors import ConfigError, PlanError, UnsupportedInput
from mesh_core.hosts.diffusers import stats
from mesh_core.hosts.split_model import SplitModel
from mesh_core.plugins import Plugins
from tests.support.workers import thread_workers

MODEL = Path(__file__).parents[2] / "examples" / "tiny-klein" / "model"


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.load()


@pytest.fixture(scope="module")
def addresses(plugins: Plugins) -> Iterator[list[str]]:
    with thread_workers(MODEL, 2, "inproc", plugins=plugins) as workers:
        yield [w.address for w in workers]


def _load_whole() -> Any:
    return _quiet(mesh_core.load_pipeline(MODEL, local=":", device="cpu"))


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _draw(pipeline: Any, **extra: Any) -> torch.Tensor:
    arguments = {"prompt": "red heart", "height": 64, "width": 96, "num_inference_steps": 2, **extra}
    images: torch.Tensor = pipeline(output_type="pt", generator=torch.Generator().manual_seed(5), **arguments).images
    return images


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    """The picture of the pipeline as diffusers loads it, without any code of the mesh."""
    whole = Flux2KleinPipeline.from_pretrained(MODEL, dtype=torch.bfloat16)
    return _draw(_quiet(whole))


@pytest.mark.parametrize("local", [":0", ":5", ":12", ":"])
def test_a_split_pipeline_draws_the_same(
    local: str, addresses: list[str], plugins: Plugins, expected: torch.Tensor
) -> None:
    pipeline = _quiet(mesh_core.load_pipeline(MODEL, local=local, workers=addresses, device="cpu", plugins=plugins))
    assert torch.equal(_draw(pipeline), expected)
    held = {name for name, p in pipeline.transformer.named_parameters() if not p.is_meta}
    mesh = pipeline.transformer.mesh
    assert held == set(mesh.checkpoint.spec.parameters_of(mesh.plan.local)), "remote blocks were read here"
    mesh.close()


@pytest.mark.parametrize(
    "extra", [{"num_images_per_prompt": 2}, {"prompt": ["cat", "dog"]}, {"image": "a reference"}], ids=str
)
def test_batches_and_reference_images(extra: dict[str, Any], addresses: list[str], plugins: Plugins) -> None:
    if "image" in extra:
        from PIL import Image

        extra = {"image": Image.new("RGB", (64, 64), "orange")}
    whole = _load_whole()
    wanted = _draw(whole, **extra)
    mesh_core.split(whole, local=":3", workers=addresses, plugins=plugins)
    assert torch.equal(_draw(whole, **extra), wanted)
    mesh_core.unsplit(whole)


def test_cutting_anew_and_undoing(addresses: list[str], plugins: Plugins, expected: torch.Tensor) -> None:
    pipeline = _quiet(mesh_core.load_pipeline(MODEL, local=":7", workers=addresses[:1], device="cpu", plugins=plugins))
    mesh_core.split(pipeline, local=":2", workers=addresses, plugins=plugins)
    assert torch.equal(_draw(pipeline), expected) and isinstance(pipeline.transformer, SplitModel)
    mesh_core.unsplit(pipeline)
    assert torch.equal(_draw(pipeline), expected) and not isinstance(pipeline.transformer, SplitModel)
    assert not any(p.is_meta for p in pipeline.transformer.parameters())
    with pytest.raises(PlanError, match="not split"):
        stats(pipeline)


def test_classifier_free_guidance_keeps_its_two_runs_apart(addresses: list[str], plugins: Plugins) -> None:
    whole = Flux2KleinPipeline.from_pretrained(MODEL, dtype=torch.bfloat16, is_distilled=False)
    wanted = _draw(_quiet(whole), guidance_scale=3.0)
    mesh_core.split(whole, local=":4", workers=addresses, plugins=plugins)
    assert torch.equal(_draw(whole, guidance_scale=3.0), wanted)
    assert len(stats(whole).steps) == 4
    mesh_core.unsplit(whole)


def test_a_failed_split_changes_nothing(addresses: list[str], plugins: Plugins, expected: torch.Tensor) -> None:
    pipeline = _quiet(mesh_core.load_pipeline(MODEL, local=":6", workers=addresses, device="cpu", plugins=plugins))
    before = pipeline.transformer.mesh
    with pytest.raises(PlanError, match="past the model"):
        mesh_core.split(pipeline, local=":99", workers=addresses, plugins=plugins)
    assert pipeline.transformer.mesh is before and torch.equal(_draw(pipeline), expected)
    before.close()


def test_fewer_bytes_cost_little_of_the_picture(addresses: list[str], plugins: Plugins, expected: torch.Tensor) -> None:
    crossed = []
    for quality, least in (("lossless", 100.0), ("transparent", 34.0), ("fast", 24.0)):
        pipeline = _quiet(
            mesh_core.load_pipeline(
                MODEL, local=":4", workers=addresses, quality=quality, device="cpu", plugins=plugins
            )
        )
        error = (_draw(pipeline).double() - expected.double()).square().mean().item()
        psnr = 200.0 if error == 0 else -10 * torch.log10(torch.tensor(error)).item()
        assert psnr >= least, f"{quality}: {psnr:.1f} dB"
        crossed.append(sum(h.in_coded for step in stats(pipeline).steps for h in step.hops))
        pipeline.transformer.mesh.close()
    assert crossed[0] > 2 * crossed[1] > 2 * crossed[2]


def test_what_a_split_model_cannot_do_is_said(addresses: list[str], plugins: Plugins, tmp_path: Path) -> None:
    pipeline = _quiet(mesh_core.load_pipeline(MODEL, local=":6", workers=addresses, device="cpu", plugins=plugins))
    with pytest.raises(UnsupportedInput, match="float32"):
        pipeline.to(torch.float32)
    with pytest.raises(ConfigError, match="only a part"):
        pipeline.transformer.save_pretrained(tmp_path)
    assert pipeline.to("cpu").transformer.device == torch.device("cpu")
    pipeline.transformer.mesh.close()


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model_index"):
        mesh_core.load_pipeline(MODEL / "transformer")
