"""Checkpoints that somebody replaces and overwrites while sessions open: an error, or exactly one file's picture."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import copytree

import pytest
import torch
from diffusers import Flux2KleinPipeline

import mesh_core
from mesh_core.builtin import load_plugins
from mesh_core.errors import MeshError
from mesh_core.plugins.registry import Plugins
from tests.adapters import tiny
from tests.support import pipelines
from tests.support.workers import thread_workers

OPENS = 10
"""Of each test: at least this many, and until one gave a picture."""

MOST_OPENS = 60


@contextmanager
def swapped(file: Path, contents: list[bytes]) -> Iterator[None]:
    """The file holds one content after the other, with one size and modification time, until the context ends."""
    ended = threading.Event()

    def swap() -> None:
        turn = 0
        # Short enough to meet an open, and long enough to open in, longer each time, by turns.
        while not ended.wait((0.02, 0.07, 0.3 + turn / 40)[turn % 3]):
            turn += 1
            # Windows replaces no file that is open.
            with suppress(PermissionError):
                if turn % 4 < 2:
                    other = file.with_suffix(".new")
                    other.write_bytes(contents[turn % 2])
                    os.utime(other, ns=(10**18, 10**18))
                    os.replace(other, file)
                else:
                    with file.open("r+b") as stream:
                        stream.write(contents[turn % 2])
                    if sys.platform != "win32":
                        os.utime(file, ns=(10**18, 10**18))

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return load_plugins()


@pytest.mark.parametrize("whose", ["the worker's", "both"])
def test_no_open_mixes_two_files(whose: str, plugins: Plugins, tmp_path: Path) -> None:
    served = tmp_path / "served" / "klein"
    pipelines.save(served)
    one = copytree(served, tmp_path / "one")
    two = copytree(served, tmp_path / "two")
    tiny.transformer(guidance=False, dtype=torch.bfloat16, seed=1).save_pretrained(two / "transformer")
    name = Path("transformer") / "diffusion_pytorch_model.safetensors"
    pictures = [
        pipelines.run(Flux2KleinPipeline.from_pretrained(folder, dtype=torch.bfloat16)) for folder in (one, two)
    ]
    right = pictures[:1] if whose == "the worker's" else pictures
    opened = made = 0
    with thread_workers(served.parent, 1, "inproc", plugins=plugins) as (worker,):
        with swapped(served / name, [(folder / name).read_bytes() for folder in (one, two)]):
            while opened < OPENS or (not made and opened < MOST_OPENS):
                opened += 1
                worker.worker.stages.clear()
                try:
                    pipeline = mesh_core.load_pipeline(
                        one if whose == "the worker's" else served,
                        local=":1",
                        workers=[worker.address],
                        device="cpu",
                        plugins=plugins,
                    )
                except MeshError:
                    continue
                picture = pipelines.run(pipeline)
                pipeline.transformer.mesh.close()
                assert any(torch.equal(picture, p) for p in right), f"open {opened} mixed two files"
                made += 1
    assert made, "every open failed, so nothing was shown"
