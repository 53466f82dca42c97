"""Workers in threads, as a stranger's tests have them: with plugins that are not installed, over any transport."""

from __future__ import annotations

import os
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from mesh_core import wire
from mesh_core.builtin import builtin_plugins
from mesh_core.errors import Unreachable
from mesh_core.hookspecs import ENTRY_POINT_GROUP
from mesh_core.host.remote import Remote
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Settings
from mesh_core.testing import ThreadWorker, mesh_home, thread_workers, wait_until
from mesh_core.transport.base import Address
from tests.adapters import tiny
from tests.support.splitting import split


@pytest.fixture
def plugins() -> Plugins:
    modules = {"pigeon": "tests.testing.pigeon", "klein": "mesh_klein.plugin", "codecs": "mesh_codec.plugin"}
    return Plugins(builtin_plugins(), [EntryPoint(name, module, ENTRY_POINT_GROUP) for name, module in modules.items()])


def catalogue(worker: ThreadWorker, plugins: Plugins) -> wire.Catalogued:
    remote = Remote(Address(worker.address), plugins, Settings())
    remote.connect()
    try:
        answer = remote.ask(wire.Catalogue(wire.next_id()), wire.Catalogued, timeout=20)
        assert isinstance(answer, wire.Catalogued)
        return answer
    finally:
        remote.close()


def test_workers_over_a_transport_of_a_plugin(tmp_path: Path, plugins: Plugins) -> None:
    with thread_workers(tmp_path, 2, "pigeon", plugins=plugins) as workers:
        assert [w.name for w in workers] == ["w0", "w1"]
        assert all(w.address.startswith("pigeon://") for w in workers)
        assert catalogue(workers[1], plugins).checkpoints == []


def test_a_chain_of_workers_over_a_transport_of_a_plugin(tmp_path: Path, plugins: Plugins) -> None:
    model, inputs = tiny.transformer(guidance=False), tiny.inputs(guidance=False)
    path = tiny.saved(tmp_path / "models" / "klein")
    with mesh_home(tmp_path), thread_workers(path.parent, 2, "pigeon", plugins=plugins) as workers:
        with split(path, ":1", workers, plugins) as run, torch.no_grad():
            assert torch.equal(run(inputs), model(**inputs, return_dict=False)[0])
            assert [hop.worker for hop in run.stats.steps[0].hops] == ["w0", "w1"]


def test_a_restarted_worker_is_another_at_the_same_address(tmp_path: Path, plugins: Plugins) -> None:
    with mesh_home(tmp_path), thread_workers(tmp_path, 1, "mesh", plugins=plugins) as (worker,):
        before, address = worker.worker, worker.address
        worker.restart()
        assert worker.worker is not before and worker.address == address
        catalogue(worker, plugins)


def test_a_stopped_worker_is_not_reached(tmp_path: Path, plugins: Plugins) -> None:
    with thread_workers(tmp_path, 1, plugins=plugins) as (worker,):
        worker.stop()
        with pytest.raises(Unreachable):
            plugins.transport("inproc").connect(Address(worker.address), 0.1)


def test_mesh_home_is_as_it_was_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for before in ("/somewhere", None):
        if before is None:
            monkeypatch.delenv("MESH_HOME")
        else:
            monkeypatch.setenv("MESH_HOME", before)
        with mesh_home(tmp_path):
            assert os.environ["MESH_HOME"] == str(tmp_path)
        assert os.environ.get("MESH_HOME") == before


def test_waiting_in_vain_says_for_what() -> None:
    with pytest.raises(AssertionError, match="a miracle did not happen"):
        wait_until(lambda: False, 0.02, "a miracle")
