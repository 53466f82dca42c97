"""docs/how-to/write-a-codec.md is a whole codec: its files, taken as they stand, pass the conformance test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "write-a-codec.md"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    parts = re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "mesh_fp8").mkdir()
    (tmp_path / "mesh_fp8" / "__init__.py").touch()
    for name in dict(parts):
        # A file that the page shows in several parts.
        whole = "\n\n".join(text for other, text in parts if other == name)
        (tmp_path / name).write_text(whole, encoding="utf-8")
    return tmp_path


def run(project: Path, *arguments: str) -> str:
    paths = os.pathsep.join([str(project), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=project,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_passes_its_own_conformance_test(project: Path) -> None:
    assert "1 passed" in run(project, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_fp8.py")


def test_the_plugin_of_the_page_registers_the_codec(project: Path) -> None:
    code = "from mesh_fp8.plugin import mesh_register_codecs as m; m(lambda codec: print(codec.name))"
    assert run(project, "-c", code).strip() == "fp8"
