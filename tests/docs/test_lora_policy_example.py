"""The example of a LoRA policy is a real plugin: built, installed, listed, and its word counts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "lora-policy"

ASK = """
import json
from mesh_core.loras.policy import LoraFacts
from mesh_core.model.plan import WorkerInfo
from mesh_core.builtin import load_plugins
from mesh_core.plugins.registry import Plugins
from mesh_core.model.spans import BlockSpan

plugins = load_plugins()
facts = {held: LoraFacts("turbo", "0" * 64, 1 << 40, 1 << 40, held, "default", 1) for held in (False, True)}
answers = [
    plugins.hook.mesh_place_lora(lora=facts[held], stage=BlockSpan(0, 4), worker=WorkerInfo(worker)).action
    for worker in ("studio (mesh://10.0.0.1:7777)", "stranger (mesh://10.0.0.2:7777)")
    for held in (False, True)
]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("policy")
    source = shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    options = ["--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(source)]
    subprocess.run([*pip, *options], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return {**os.environ, "PYTHONPATH": str(folder / "site"), "MESH_HOME": str(folder / "home")}


def run(environment: dict[str, str], *command: str, **more: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], env={**environment, **more}, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def test_it_is_listed(environment: dict[str, str]) -> None:
    assert "lora-friends" in run(environment, "-m", "mesh_core.cli", "plugins")


def test_its_word_counts_and_without_one_the_cores_does(environment: dict[str, str]) -> None:
    friends = json.loads(run(environment, "-c", ASK, MESH_LORA_FRIENDS="studio, attic"))
    assert friends == ["send", "reference", "refuse", "reference"]
    assert json.loads(run(environment, "-c", ASK)) == ["refuse", "reference", "refuse", "reference"]
