"""docs/how-to/write-an-adapter.md is a whole adapter: its files, taken as they stand, load and pass their own test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.docs.test_docs import ROOT

PAGE = ROOT / "docs" / "how-to" / "write-an-adapter.md"
_FILE = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mesh-example")
    for name, content in _FILE.findall(PAGE.read_text("utf-8")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "mesh_example" / "__init__.py").touch()
    return folder


def _run(project: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment: Mapping[str, str] = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(project), *filter(None, [os.environ.get("PYTHONPATH")])]),
        **variables,
    }
    return subprocess.run([sys.executable, *arguments], cwd=project, env=environment, capture_output=True, text=True)


def test_the_page_passes_its_own_conformance_test(project: Path) -> None:
    done = _run(project, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_example.py")
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_mesh_plugins_lists_the_adapter_of_the_page(project: Path, tmp_path: Path) -> None:
    wheel = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*wheel, "--target", str(tmp_path), str(project)], check=True, capture_output=True)
    done = _run(project, "-m", "mesh_core.cli", "plugins", PYTHONPATH=str(tmp_path))
    assert re.search(r"^example +comfyui-mesh-example 0\.1\.0 +loaded +adapter example", done.stdout, re.M), done.stdout
