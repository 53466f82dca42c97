"""One ComfyUI, and one worker with the same checkpoints, for all tests of this folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import save_file

from tests.comfy.install import ComfyUI, installed
from tests.comfy.server import ROOT, Server, comfy_server
from tests.support.workers import ProcessWorker, process_worker

EXAMPLE = ROOT / "examples" / "tiny-klein"
ATTACHMENTS = Path(__file__).parent / "attachments"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test of a session waits for ComfyUI to start, or to be set up."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def comfy() -> ComfyUI:
    return installed()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ComfyUI calls its base directory, with the models that the tests use."""
    base = tmp_path_factory.mktemp("comfyui")
    models = base / "models" / "diffusion_models"
    single_file(EXAMPLE / "model", models / "tiny-klein.safetensors")
    _small_dev(tmp_path_factory.mktemp("tiny-dev") / "transformer")
    single_file(tmp_path_factory.getbasetemp() / "tiny-dev0", models / "tiny-dev.safetensors")
    (base / "input").mkdir()
    for seed, name in enumerate(("first", "second")):
        noise = torch.randn(1, 128, 8, 4 * (seed + 1), generator=torch.Generator().manual_seed(seed))
        save_file(
            {"latent_tensor": noise, "latent_format_version_0": torch.tensor([])}, base / "input" / f"{name}.latent"
        )
    loras = base / "models" / "loras"
    loras.mkdir()
    for file in (EXAMPLE / "loras").glob("*.safetensors"):
        shutil.copy(file, loras)
    return base


def single_file(model: Path, to: Path) -> None:
    convert = [sys.executable, str(EXAMPLE / "train" / "single_file.py"), "--model", str(model), str(to)]
    subprocess.run(convert, check=True, capture_output=True)


def _small_dev(folder: Path) -> None:
    """FLUX.2 Dev's architecture with random weights, as small as ComfyUI can detect it."""
    torch.manual_seed(1)
    model = Flux2Transformer2DModel(
        in_channels=128,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=128,
        num_attention_heads=1,
        joint_attention_dim=192,
        mlp_ratio=3.0,
        axes_dims_rope=(32, 32, 32, 32),
        guidance_embeds=True,
    )
    model.to(torch.bfloat16).save_pretrained(folder)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MESH_HOME of ComfyUI and the workers: one user, who does not wait long."""
    home = tmp_path_factory.mktemp("mesh-home")
    (home / "config").mkdir()
    (home / "config" / "config.toml").write_text("[deadlines]\nconnect = 4.0\n", encoding="utf-8")
    return home


@pytest.fixture(scope="session")
def server(comfy: ComfyUI, base: Path, home: Path) -> Iterator[Server]:
    with comfy_server(comfy, base, home, ROOT, EXAMPLE / "comfy_nodes", ATTACHMENTS) as server:
        yield server


@pytest.fixture(scope="session")
def worker(base: Path, home: Path) -> Iterator[ProcessWorker]:
    library = base / "loras-of-the-worker"
    library.mkdir()
    shutil.copy(EXAMPLE / "loras" / "night.safetensors", library / "night-of-the-worker.safetensors")
    models = base / "models" / "diffusion_models"
    with process_worker(models, "--loras", str(library), home=home, name="shelf") as worker:
        yield worker
