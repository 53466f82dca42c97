"""The shipped tiny-klein pipeline: loads without code of ours, draws what it drew, survives odd prompts."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors.torch import load_file, save_file

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-klein"
REFERENCE = EXAMPLE / "results" / "reference.safetensors"  # uint8 [128, 128, 3] by prompt, 4 steps, seed 0, float32
TOLERANCE_DB = 40.0  # PSNR; other processors and library versions may round differently
BYTES_OF_WEIGHTS = 40_000_000


@pytest.fixture(scope="module")
def pipeline() -> Flux2KleinPipeline:
    made = Flux2KleinPipeline.from_pretrained(EXAMPLE / "model")
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipeline: Flux2KleinPipeline, prompt: str, **options: Any) -> torch.Tensor:
    """A picture `[128, 128, 3]` in [0, 1] at 4 steps from seed 0."""
    noise = torch.Generator().manual_seed(0)
    size = {"height": 128, "width": 128, "num_inference_steps": 4}
    return torch.from_numpy(pipeline(prompt=prompt, generator=noise, output_type="np", **size, **options).images[0])


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * torch.log10((a - b).square().mean().clamp(min=1e-10)))


def module_from(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.parent.name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("prompt", ["crying face", "fox on a purple background"])
def test_draws_the_reference_in_under_20_seconds(pipeline: Flux2KleinPipeline, prompt: str) -> None:
    begin = time.monotonic()
    picture = draw(pipeline, prompt)
    assert time.monotonic() - begin < 20
    assert psnr(picture, load_file(REFERENCE)[prompt].float() / 255) > TOLERANCE_DB


@pytest.mark.parametrize("prompt", ["", "qwxz blorp", "日本語 🦊", "word " * 700])
def test_any_prompt_gives_an_image(pipeline: Flux2KleinPipeline, prompt: str) -> None:
    picture = draw(pipeline, prompt)
    assert picture.shape == (128, 128, 3)
    assert picture.isfinite().all()
    assert picture.std() > 0.02


def test_everything_fits_in_the_repository_and_is_safetensors() -> None:
    files = [f for f in EXAMPLE.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files if f.suffix == ".safetensors") <= BYTES_OF_WEIGHTS
    assert not [f for f in files if f.suffix in {".bin", ".ckpt", ".pt", ".pth", ".pkl"}]


@pytest.mark.parametrize("name", ["night", "meshling"])
def test_lora_changes_the_picture_and_is_gone_at_strength_0(pipeline: Flux2KleinPipeline, name: str) -> None:
    prompt = "meshling" if name == "meshling" else "crying face"
    plain = draw(pipeline, prompt)
    made = {}
    for file in (f"{name}.safetensors", f"{name}.kohya.safetensors"):
        assert (EXAMPLE / "loras" / file).stat().st_size <= 1_000_000
        pipeline.load_lora_weights(EXAMPLE / "loras", weight_name=file, adapter_name="lora")
        try:
            made[file] = draw(pipeline, prompt)
            pipeline.set_adapters(["lora"], [0.0])
            assert psnr(draw(pipeline, prompt), plain) > 60
        finally:
            pipeline.unload_lora_weights()
    peft, kohya = made.values()
    assert psnr(peft, plain) < 20
    assert psnr(peft, kohya) > 45


def test_single_file_is_the_same_transformer(tmp_path: Path) -> None:
    whole = EXAMPLE / "model" / "transformer"
    script = EXAMPLE / "train" / "single_file.py"
    subprocess.run([sys.executable, script, tmp_path / "tiny.safetensors"], check=True, capture_output=True)
    loaded = Flux2Transformer2DModel.from_single_file(tmp_path / "tiny.safetensors", config=str(whole))
    stored = load_file(whole / "diffusion_pytorch_model.safetensors")
    assert loaded.state_dict().keys() == stored.keys()
    assert all(torch.equal(t, stored[k].to(t.dtype)) for k, t in loaded.state_dict().items())


def test_comfy_nodes_do_what_the_pipeline_does(pipeline: Flux2KleinPipeline) -> None:
    nodes = module_from(EXAMPLE / "comfy_nodes" / "__init__.py")
    (conditioning,) = nodes.TinyKleinTextEncode().encode("crying face", str(EXAMPLE / "model"))
    expected, _ = pipeline.encode_prompt("crying face")
    assert torch.allclose(conditioning[0][0], expected, atol=1e-4)

    kept: dict[str, torch.Tensor] = {}

    def keep(pipe: Any, step: int, timestep: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept.update(values)
        return values

    picture = draw(pipeline, "crying face", callback_on_step_end=keep)
    latents = kept["latents"].mT.reshape(1, 128, 8, 8)
    (decoded,) = nodes.TinyKleinDecode().decode({"samples": latents}, str(EXAMPLE / "model"))
    assert psnr(decoded[0], picture) > 60


def write_reference() -> None:
    """Store new reference pictures after a training: `python tests/test_tiny_klein.py`."""
    torch.set_num_threads(1)
    made = Flux2KleinPipeline.from_pretrained(EXAMPLE / "model")
    prompts = ("crying face", "fox on a purple background")
    save_file({p: (draw(made, p) * 255).round().byte().contiguous() for p in prompts}, REFERENCE)


if __name__ == "__main__":
    write_reference()
