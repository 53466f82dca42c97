"""Workers for tests: in threads of this process, or as real processes started by ``mesh serve``.

The host in a test and its workers share one MESH_HOME, so they are the same user on the same machine.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep

from mesh_core.builtin import load_plugins
from mesh_core.errors import TransportError
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Settings
from mesh_core.transport.base import Listener
from mesh_core.transport.keys import KeyStore
from mesh_core.worker.server import Worker, WorkerOptions

ANY = {"mesh": "mesh://127.0.0.1:0", "inproc": "inproc://"}
"""Addresses at which the system chooses the rest."""

_STARTS_WITHIN = 120.0
_ANNOUNCED = re.compile(r"listening at (\S+)")


@contextmanager
def mesh_home(folder: Path) -> Iterator[Path]:
    """MESH_HOME is ``folder`` meanwhile; for fixtures that live longer than one test."""
    before = os.environ.get("MESH_HOME")
    os.environ["MESH_HOME"] = str(folder)
    try:
        yield folder
    finally:
        if before is None:
            del os.environ["MESH_HOME"]
        else:
            os.environ["MESH_HOME"] = before


def wait_until(condition: Callable[[], object], within: float = 10.0, what: str = "it") -> None:
    """Return when ``condition`` holds; fail after ``within`` seconds."""
    end = monotonic() + within
    while not condition():
        assert monotonic() < end, f"{what} did not happen within {within:.0f} s"
        sleep(0.01)


@dataclass
class ThreadWorker:
    """A worker that serves in a thread. ``worker`` is replaced by `restart`."""

    roots: tuple[Path, ...]
    plugins: Plugins
    name: str
    address: str
    settings: Settings = field(default_factory=Settings)
    memory: int | None = 4 << 30

    def __post_init__(self) -> None:
        self._start()
        self.address = self.worker.listener.address

    def _start(self) -> None:
        scheme = self.address.partition("://")[0]
        key = KeyStore().identity().client.public if scheme == "mesh" else ""
        listener = self._listen(scheme)
        options = WorkerOptions(self.roots, self.name, "cpu", self.memory, key, self.settings)
        self.worker = Worker(options, listener, self.plugins)
        self._thread = threading.Thread(target=self.worker.serve, name=self.name, daemon=True)
        self._thread.start()

    def _listen(self, scheme: str) -> Listener:
        # The system frees a port a moment after its listener was closed.
        end = monotonic() + 5
        while True:
            try:
                return self.plugins.transport(scheme).listen(self.address)
            except TransportError:
                if monotonic() > end:
                    raise
                sleep(0.02)

    def stop(self) -> None:
        self.worker.stop()
        self._thread.join(timeout=20)
        assert not self._thread.is_alive(), f"{self.name} does not stop"

    def restart(self) -> None:
        """Another worker, that knows nothing of the first one's sessions, at the same address."""
        self.stop()
        self._start()


@contextmanager
def thread_workers(
    folder: Path | Sequence[Path],
    n: int,
    scheme: str = "inproc",
    *,
    plugins: Plugins | None = None,
    settings: Settings | None = None,
    memory: int | None = 4 << 30,
) -> Iterator[list[ThreadWorker]]:
    """``n`` workers over the checkpoints in ``folder``; MESH_HOME must be set. Hosts must use the same ``plugins``
    when the scheme is ``inproc``."""
    roots = (folder,) if isinstance(folder, Path) else tuple(folder)
    plugins = plugins or load_plugins()
    workers: list[ThreadWorker] = []
    try:
        for i in range(n):
            workers.append(ThreadWorker(roots, plugins, f"w{i}", ANY[scheme], settings or Settings(), memory))
        yield workers
    finally:
        for worker in workers:
            worker.stop()


class ProcessWorker:
    """``mesh serve`` as a process of its own.

    Attributes:
        address: as announced.
        process: the running one; replaced by `restart`.
        log: the lines of its standard error so far.
    """

    def __init__(self, folder: Path, home: Path, options: Sequence[str]) -> None:
        self.home = home
        self._command = [sys.executable, "-m", "mesh_core.cli", "serve", str(folder), *options]
        self.log: list[str] = []
        self._start(port=0)

    def _start(self, port: int) -> None:
        environment = {
            **os.environ,
            "MESH_HOME": str(self.home),
            # The same number of threads as in the tests: matrix libraries split sums over threads.
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }
        self.log.clear()
        self.process = subprocess.Popen(
            [*self._command, "--port", str(port)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()
        wait_until(
            lambda: self._announced() or self.process.poll() is not None, _STARTS_WITHIN, "the worker's announcement"
        )
        address = self._announced()
        assert address, "the worker ended at once:\n" + "\n".join(self.log)
        self.address = address

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                self.log.append(line.rstrip())

    def _announced(self) -> str | None:
        return next((m[1] for line in list(self.log) if (m := _ANNOUNCED.search(line))), None)

    def kill(self) -> None:
        """End it without a chance to say goodbye."""
        self.process.kill()
        self.process.wait(10)

    def pause(self) -> None:
        """Stop answering, as a machine that sleeps does."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def restart(self) -> None:
        """Start another process at the same port."""
        self.kill()
        self._start(int(self.address.partition("?")[0].rpartition(":")[2]))


@contextmanager
def process_worker(
    folder: Path, *options: str, home: Path | None = None, settings: str = "", name: str = "worker"
) -> Iterator[ProcessWorker]:
    """A worker process over the checkpoints in ``folder``.

    Args:
        options: further arguments of ``mesh serve``.
        home: its MESH_HOME; by default that of this process.
        settings: text of its config.toml.
    """
    home = home or Path(os.environ["MESH_HOME"])
    if settings:
        (home / "config").mkdir(parents=True, exist_ok=True)
        (home / "config" / "config.toml").write_text(settings, encoding="utf-8")
    worker = ProcessWorker(folder, home, ["--name", name, *options])
    try:
        yield worker
    finally:
        worker.kill()
