"""Sessions whose states cross in memory of a device: chosen by itself, exact, and only where nearness is proven."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from mesh_codec.base import CodecChoice
from mesh_codec.errors import CodecUnsupported
from mesh_core.crossing import device_codec
from mesh_core.errors import WireMalformed
from mesh_core.hookspecs import hookimpl
from mesh_core.testing.workers import listening_worker
from mesh_core.transport.memory_link import MemoryLinks
from mesh_core.worker.server import WorkerOptions
from tests.support.negotiating import over, plugins_with, run, state, used
from tests.support.shared_device import EmulatedDevice
from tests.support.workers import ThreadWorker, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has memory without a name")


class Device:
    """A plugin that has the state cross in memory of the device, wherever it goes."""

    @hookimpl
    def mesh_choose_codec(self, role: str) -> CodecChoice | None:
        return CodecChoice("device", {"format": "emulated-1"}, "as the plugin says") if role == "hidden" else None


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_codec, "CudaDriver", EmulatedDevice)


def serve(pipe: Connection, home: str, folder: Path) -> None:
    """A worker in a process of its own."""
    os.environ["MESH_HOME"] = home
    device_codec.CudaDriver = EmulatedDevice  # type: ignore[misc,assignment]
    torch.set_num_threads(1)
    worker = listening_worker("mesh://127.0.0.1:0", WorkerOptions((folder,), "far", memory=1 << 30), plugins_with())
    pipe.send(worker.listener.address)
    worker.serve()


@contextmanager
def process(folder: Path) -> Iterator[tuple[str, Any]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    started = context.Process(target=serve, args=(theirs, os.environ["MESH_HOME"], folder), daemon=True)
    started.start()
    try:
        assert ours.poll(60), "the worker did not start"
        yield ours.recv(), started
    finally:
        started.kill()
        started.join()


def test_a_state_crosses_in_memory_of_the_device_there_and_back(tmp_path: Path, start: Any) -> None:
    """Chosen by itself once it was timed, for a quality that loses too: between processes, and nothing is left."""
    plugins = plugins_with()
    workers = start(plugins)
    driver = plugins.codec("device")._driver  # type: ignore[attr-defined]
    with (
        process(tmp_path) as (address, _),
        over(tmp_path, workers, plugins, address=address, quality="fast") as session,
    ):

        def settled() -> bool:
            run(session, state(1 << 20))
            return used(session)[-1] == "device"

        wait_until(settled, 60, "the choice of the device's memory")
        for step in range(3):
            assert torch.equal(run(session, state(1 << 20, seed=step)), state(1 << 20, seed=step))
        last = session.stats.steps[-1]
        assert last.hops[0].in_coded == 0 and last.hops[0].in_raw == 4 << 20
        assert last.reason.startswith("shared memory measured ") and "GPU memory" in last.reason
        assert driver.allocated and last.resent == 0
    wait_until(lambda: not driver.allocated and not driver.opened, 10, "all memory to be given back")


def test_a_worker_killed_while_it_has_memory_open(tmp_path: Path, start: Any) -> None:
    plugins = plugins_with(Device())
    workers = start(plugins)
    driver = plugins.codec("device")._driver  # type: ignore[attr-defined]
    with process(tmp_path) as (address, worker), over(tmp_path, workers, plugins, address=address) as session:
        assert torch.equal(run(session, state()), state())
        assert driver.allocated
        worker.kill()
        worker.join()
        session.close()
        wait_until(lambda: not driver.allocated and not driver.opened, 10, "all memory to be given back")


def test_a_chain_hands_on_in_memory_of_the_device(tmp_path: Path, start: Any) -> None:
    plugins = plugins_with(Device())
    with over(tmp_path, start(plugins, 3), plugins) as session:
        for step in range(4):
            assert torch.equal(run(session, state(seed=step)), state(seed=step))
        assert all(hop.in_coded == 0 for hop in session.stats.steps[-1].hops)
        assert session.stats.reconnects == 0 and not any(s.resent for s in session.stats.steps)


def test_it_is_not_chosen_where_nothing_is_proven(tmp_path: Path, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decline(monkeypatch)
    plugins = plugins_with()
    with over(tmp_path, start(plugins), plugins) as session:
        for _ in range(8):
            assert torch.equal(run(session, state(1 << 20)), state(1 << 20))
        assert "device" not in used(session)
        assert "shared" not in session.stats.table()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_host_that_wants_it_all_the_same_is_refused(
    tmp_path: Path, start: Any, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    decline(monkeypatch)
    plugins = plugins_with(Device())
    started: list[ThreadWorker] = start(plugins, workers)
    with (
        pytest.raises(CodecUnsupported, match="has not proven to be here"),
        over(tmp_path, started, plugins) as session,
    ):
        run(session, state())


def decline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers take no memory."""

    def declined(*_: object) -> bytes:
        raise WireMalformed("not now")

    monkeypatch.setattr(MemoryLinks, "_take", declined)
