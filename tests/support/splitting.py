"""A host for tests of sessions: splits a checkpoint on disk over workers, without a pipeline around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from mesh_codec.base import Quality
from mesh_core.host.options import SessionOptions
from mesh_core.host.progress import ProgressReport
from mesh_core.host.runner import SplitRunner, Workers, open_session, place
from mesh_core.model.checkpoint import read_header
from mesh_core.model.library import Checkpoint, recognise
from mesh_core.model.numerics import Numerics, usual_numerics
from mesh_core.model.weights import WeightReader
from mesh_core.plugins.registry import Plugins
from mesh_core.programs.identity import identify
from mesh_core.system.config import Settings
from tests.support.workers import ThreadWorker


def checkpoint_at(path: Path, plugins: Plugins) -> Checkpoint:
    return recognise(read_header(path), plugins)


@contextmanager
def split(
    path: Path,
    local: str | None,
    workers: Workers | Sequence[ThreadWorker],
    plugins: Plugins,
    *,
    dtype: torch.dtype = torch.float32,
    quality: Quality = "lossless",
    codec: str | None = None,
    settings: Settings | None = None,
    report: ProgressReport | None = None,
    numerics: Numerics | None = None,
) -> Iterator[SplitRunner]:
    """The model at ``path``, its first span here and the others on ``workers``."""
    checkpoint = checkpoint_at(path, plugins)
    addresses = [w.address if isinstance(w, ThreadWorker) else w for w in workers]
    numerics = numerics or usual_numerics(checkpoint.spec, dtype, torch.device("cpu"), plugins.weight_formats())
    options = SessionOptions(numerics, torch.device("cpu"), quality, settings or Settings(), codec)
    placement = place(checkpoint, local, addresses, plugins, options, None)
    session = open_session(lambda: identify(checkpoint), placement, options, plugins, report)
    stage = checkpoint.adapter.build_stage(
        checkpoint.spec, placement.plan.local, WeightReader(checkpoint.header), device="cpu", numerics=options.numerics
    )
    runner = SplitRunner(checkpoint, placement.plan, stage, session, options.numerics)
    try:
        yield runner
    finally:
        runner.close()
