"""One ComfyUI, and one worker with the same checkpoints, for all tests of this folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.comfy.install import ComfyUI, installed
from tests.comfy.server import ROOT, Server, comfy_server
from tests.support.workers import ProcessWorker, process_worker

EXAMPLE = ROOT / "examples" / "tiny-klein"


@pytest.fixture(scope="session")
def comfy() -> ComfyUI:
    return installed()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ComfyUI calls its base directory, with the models that the tests use."""
    base = tmp_path_factory.mktemp("comfyui")
    models = base / "models" / "diffusion_models"
    convert = [sys.executable, str(EXAMPLE / "train" / "single_file.py"), str(models / "tiny-klein.safetensors")]
    subprocess.run(convert, check=True, capture_output=True)
    loras = base / "models" / "loras"
    loras.mkdir()
    for file in (EXAMPLE / "loras").glob("*.safetensors"):
        shutil.copy(file, loras)
    return base


@pytest.fixture(scope="session")
def server(comfy: ComfyUI, base: Path, _own_home: Path) -> Iterator[Server]:
    with comfy_server(comfy, base, _own_home, ROOT, EXAMPLE / "comfy_nodes") as server:
        yield server


@pytest.fixture(scope="session")
def worker(base: Path) -> Iterator[ProcessWorker]:
    with process_worker(base / "models" / "diffusion_models", name="shelf") as worker:
        yield worker
