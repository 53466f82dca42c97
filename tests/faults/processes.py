"""Worker and host processes that start in milliseconds, because what they import was imported before they fork.

Where the system cannot do that they are spawned: slower, and otherwise the same.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import sleep
from typing import Any

import diffusers  # noqa: F401  (the time that adapters would take to import it)
import psutil
import torch

from mesh_core.builtin import load_plugins
from mesh_core.system.config import Settings
from mesh_core.testing.workers import listening_worker
from mesh_core.worker.server import WorkerOptions
from tests.adapters import tiny
from tests.support.net import lasting_port
from tests.support.splitting import split
from tests.support.workers import wait_until

_WAYS = multiprocessing.get_all_start_methods()


def _context() -> Any:
    context = multiprocessing.get_context("forkserver" if "forkserver" in _WAYS else "spawn")
    if "forkserver" in _WAYS:
        context.set_forkserver_preload([__name__])
    return context


class FaultyProcess:
    """A process that tests may kill, pause and watch."""

    process: BaseProcess

    def start(self, target: Any, *arguments: Any) -> None:
        self.process = _context().Process(target=target, args=arguments, daemon=True)
        self.process.start()
        self.system = psutil.Process(self.process.pid)

    def kill(self) -> None:
        """End it without a chance to say goodbye."""
        self.process.kill()
        self.process.join(10)

    def pause(self) -> None:
        """Stop answering, as a machine that sleeps does."""
        self.system.suspend()

    def resume(self) -> None:
        self.system.resume()

    def cpu(self) -> float:
        """Seconds of processor time that it has used."""
        times = self.system.cpu_times()
        return float(times.user + times.system)

    def resident(self) -> int:
        """Bytes of memory."""
        return int(self.system.memory_info().rss)

    def idle(self, over: float = 0.4) -> bool:
        """Whether it computes nothing for ``over`` seconds."""
        before = self.cpu()
        sleep(over)
        return self.cpu() - before < over / 4

    def wait_for_work(self, seconds: float = 0.15) -> None:
        """Return once it has computed for so long from now."""
        before = self.cpu()
        wait_until(lambda: self.cpu() - before > seconds, 20, "any computing")


class FastWorker(FaultyProcess):
    """A worker over the checkpoints in ``folder``, at a port that stays the same over restarts.

    Args:
        files: so many files and connections may it have open, where the system can say so.
    """

    def __init__(self, folder: Path, name: str, settings: Settings, memory: int, files: int | None = None) -> None:
        self._arguments = files, folder, name, settings, memory
        self._port = lasting_port()
        self.begin()

    def begin(self) -> None:
        """Start it; the address is known when this returns."""
        ours, theirs = _context().Pipe()
        self.start(_serve, *self._arguments, self._port, os.environ["MESH_HOME"], theirs)
        assert ours.poll(60), "the worker did not start"
        self.address: str = ours.recv()
        self._port = int(self.address.rpartition(":")[2])

    def restart(self) -> None:
        self.kill()
        self.begin()


class LoneHost(FaultyProcess):
    """A host process that runs one step after the other.

    Attributes:
        results: gives, for each step, how often it was sent again and the result.
    """

    def __init__(self, model: Path, address: str, inputs: dict[str, Any], settings: Settings) -> None:
        self.results, theirs = _context().Pipe()
        self._ready = _context().Event()
        self.start(_generate, model, address, inputs, settings, os.environ["MESH_HOME"], self._ready, theirs)

    def wait_for_step(self) -> None:
        """Return once it has opened its session and sends its first step."""
        assert self._ready.wait(60), "the host did not begin"


@contextmanager
def workers(
    folder: Path, n: int = 1, settings: Settings | None = None, *, memory: int = 4 << 30, files: int | None = None
) -> Iterator[list[FastWorker]]:
    started: list[FastWorker] = []
    try:
        for i in range(n):
            started.append(FastWorker(folder, f"w{i}", settings or Settings(), memory, files))
        yield started
    finally:
        for worker in started:
            if worker.process.is_alive():
                worker.resume()
            worker.kill()


def _prepare(home: str) -> None:
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["MESH_HOME"] = home
    torch.set_num_threads(1)


def _serve(
    files: int | None, folder: Path, name: str, settings: Settings, memory: int, port: int, home: str, ready: Any
) -> None:
    _prepare(home)
    if files is not None and sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    logging.disable(logging.ERROR)
    options = WorkerOptions((folder,), name, memory=memory, settings=settings)
    worker = listening_worker(f"mesh://127.0.0.1:{port}", options, load_plugins())
    ready.send(worker.listener.address)
    gc.freeze()
    worker.serve()


def _generate(
    model: Path, address: str, inputs: dict[str, Any], settings: Settings, home: str, ready: Any, results: Any
) -> None:
    _prepare(home)
    logging.disable(logging.ERROR)
    with split(model, ":0", [address], load_plugins(), settings=settings) as runner:
        ready.set()
        while True:
            output = runner(inputs)
            results.send((runner.stats.steps[-1].resent, output))


def slow_model(folder: Path, *, seed: int = 0, singles: int = 12) -> Path:
    """A small model on disk, of many blocks: they can be interrupted between any two."""
    return tiny.saved(folder, doubles=1, singles=singles, seed=seed)
