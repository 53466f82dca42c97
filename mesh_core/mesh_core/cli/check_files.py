"""Whether checkpoints on this machine still hold what was hashed once: all of their content is read anew.

What is remembered of a file is trusted while its size, times and inode stay the same. A disk that rots changes none of
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mesh_core.cli.findings import Finding, Verdict
from mesh_core.host.progress import THIS_MACHINE, Activity, Phase, ProgressReport
from mesh_core.model import fingerprint
from mesh_core.model.checkpoint import read_header
from mesh_core.model.library import Checkpoint, recognise
from mesh_core.plugins.registry import Plugins


def check_files(subject: str, model: Path, plugins: Plugins, report: ProgressReport) -> Iterator[Finding]:
    """The check of the checkpoint at ``model``."""
    checkpoint = recognise(read_header(model), plugins)
    status, detail, hint = content(checkpoint, report)
    yield Finding(subject, "weights", status, f"{checkpoint.name}: {detail}", hint)


def content(checkpoint: Checkpoint, report: ProgressReport) -> tuple[Verdict, str, str]:
    """Hash a checkpoint whatever is remembered of it: the verdict, what was found, and what to do.

    What was found is remembered from then on, so other weights are never taken for those that were there.

    Raises:
        CheckpointError: it cannot be read, or is being written to.
    """

    def progress(done: int, total: int) -> None:
        report(Activity(THIS_MACHINE, Phase.CHECKING, done, total))

    header, spec = checkpoint.header, checkpoint.spec
    remembered = fingerprint.known(header, spec)
    found = fingerprint.of_checkpoint(header, spec, progress, anew=True)
    if remembered is None:
        return "ok", f"fingerprint {found[:12]}, hashed for the first time", ""
    if remembered == found:
        return "ok", f"fingerprint {found[:12]}, as when it was hashed first", ""
    detail = (
        f"its content changed, though size, times and inode are the same: fingerprint {found[:12]}, it was "
        f"{remembered[:12]}"
    )
    return "FAIL", detail, "copy it again from where it came, and look at the disk's health"
