"""Disks that are full: what is only remembered is done without; what must be kept is refused, and nothing is lost."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mesh_core.plugins.registry import Plugins
from mesh_core.transport.invites import create_invite
from mesh_core.transport.keys import KeyStore
from tests.faults.conftest import IMPATIENT, Case
from tests.faults.processes import workers
from tests.support.splitting import split
from tests.support.workers import mesh_home

_ON_A_FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
from mesh_core.cli import main
sys.argv[0] = "mesh"
main()
"""
"""Every write fails as on a full disk; opening and renaming files does not."""


def test_fingerprints_that_cannot_be_remembered(
    quick: Case, tmp_path: Path, plugins: Plugins, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("where the cache belongs is a file")
    with mesh_home(tmp_path), caplog.at_level(logging.WARNING), workers(quick.path.parent) as (worker,):
        with split(quick.path, ":1", [worker.address], plugins, settings=IMPATIENT) as runner:
            assert torch.equal(runner(quick.inputs), quick.expected)
    assert any("fingerprints are not remembered" in r.getMessage() for r in caplog.records)


def test_keys_on_a_full_disk(tmp_path: Path) -> None:
    with mesh_home(tmp_path):
        create_invite("mesh://127.0.0.1:7777", name="old")
        own = KeyStore().identity()
        done = subprocess.run(
            [sys.executable, "-c", _ON_A_FULL_DISK, "keys", "invite", "--address", "mesh://127.0.0.1:7777"],
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert "Could not write" in done.stderr and "free some space" in done.stderr
        store = KeyStore()
        assert [i.name for i in store.invites()] == ["old"] and store.identity() == own
        assert not [f.name for f in (tmp_path / "config").iterdir() if f.name.startswith(".")]
