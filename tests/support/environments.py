"""Environments with plugins that were built and installed the way that a user's are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parents[1] / "plugins" / "samples"


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheels of all test distributions, built by pip."""
    folder = tmp_path_factory.mktemp("wheels")
    ignore = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    sources = shutil.copytree(SAMPLES, folder / "sources", ignore=ignore)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([*pip, *options, *(str(p) for p in sorted(sources.iterdir()))], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def environment(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """Variables of a process that sees the named test distributions beside what is installed here."""

    def make(*names: str) -> dict[str, str]:
        home = tmp_path_factory.mktemp("home")
        for name in names:
            (wheel,) = wheels.glob(f"mesh_test_{name}-*.whl")
            # A wheel of pure Python is installed by unpacking it.
            zipfile.ZipFile(wheel).extractall(home / "site")
        return {
            **os.environ,
            "PYTHONPATH": str(home / "site"),
            "MESH_HOME": str(home),
            "MESH_TEST_CALLS": str(home / "calls"),
            "MESH_DISABLE_PLUGINS": "flux2,klein,ltx",
        }

    return make
