"""A small Klein pipeline on disk, two workers for it, and what it draws when it is whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2KleinPipeline

import mesh_core
from mesh_core.builtin import load_plugins
from mesh_core.plugins.registry import Plugins
from mesh_core.programs.diffusers import stats
from tests.support import pipelines
from tests.support.workers import ThreadWorker, thread_workers


@dataclass
class SplitKlein:
    """2 + 3 blocks; cut at 2, the double blocks are here and the single ones on two workers."""

    folder: Path
    plugins: Plugins
    workers: list[ThreadWorker]

    def whole(self) -> Any:
        return Flux2KleinPipeline.from_pretrained(self.folder / "klein", dtype=torch.bfloat16)

    def split(self, pipeline: Any, local: str = ":2", **options: Any) -> Any:
        addresses = [w.address for w in self.workers]
        return mesh_core.split(pipeline, local=local, workers=addresses, plugins=self.plugins, **options)

    def load(self, local: str = ":2") -> Any:
        addresses = [w.address for w in self.workers]
        return mesh_core.load_pipeline(
            self.folder / "klein", local=local, workers=addresses, device="cpu", plugins=self.plugins
        )


@contextmanager
def split_klein(folder: Path, scheme: str = "inproc") -> Iterator[SplitKlein]:
    """Write the pipeline and start the workers."""
    plugins = load_plugins()
    pipelines.save(folder / "klein")
    with thread_workers(folder, 2, scheme, plugins=plugins) as workers:
        yield SplitKlein(folder, plugins, workers)


def run_split(pipeline: Any, **changes: Any) -> torch.Tensor:
    """The picture of one call, every step of which must have been on the workers."""
    before = len(stats(pipeline).steps)
    picture = pipelines.run(pipeline, **changes)
    assert len(stats(pipeline).steps) - before == pipelines.CALL["num_inference_steps"], "steps did not reach workers"
    return picture
