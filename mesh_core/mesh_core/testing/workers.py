"""Workers that serve in a thread of the test's process.

The host in a test and its workers share one MESH_HOME, so they are the same user on the same machine.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic, sleep

from mesh_core.builtin import load_plugins
from mesh_core.errors import TransportError
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Settings
from mesh_core.transport.base import Listener
from mesh_core.transport.keys import KeyStore
from mesh_core.worker.server import Worker, WorkerOptions

_FREE_WITHIN = 10.0
"""Seconds: the system frees a port a moment after its listener was closed, or its process killed."""


@contextmanager
def mesh_home(folder: Path) -> Iterator[Path]:
    """MESH_HOME is ``folder`` meanwhile: keys, settings and caches of the user who runs the tests stay untouched."""
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
    """Return when ``condition`` holds; AssertionError after ``within`` seconds."""
    end = monotonic() + within
    while not condition():
        assert monotonic() < end, f"{what} did not happen within {within:.0f} s"
        sleep(0.01)


def listening_worker(address: str, options: WorkerOptions, plugins: Plugins) -> Worker:
    """A worker at ``address`` that does not serve yet, with this user's key where the transport has keys.

    Raises:
        TransportError: the address is still taken after 10 s.
    """
    scheme = address.partition("://")[0]
    key = KeyStore().identity().client.public if scheme == "mesh" else ""
    return Worker(replace(options, client_key=key), _listen(address, scheme, plugins), plugins)


def _listen(address: str, scheme: str, plugins: Plugins) -> Listener:
    end = monotonic() + _FREE_WITHIN
    while True:
        try:
            return plugins.transport(scheme).listen(address)
        except TransportError:
            if monotonic() > end:
                raise
            sleep(0.02)


@dataclass
class ThreadWorker:
    """A worker that serves in a thread from the start until `stop`.

    Attributes:
        roots: folders and files with checkpoints.
        plugins: what it knows; over ``inproc``, hosts must use the same object.
        address: where to listen; then where it listens.
        memory: bytes for weights.
        loras: folders and files with LoRAs.
        worker: replaced by `restart`.
    """

    roots: tuple[Path, ...]
    plugins: Plugins
    name: str
    address: str
    settings: Settings = field(default_factory=Settings)
    memory: int | None = 4 << 30
    loras: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Serve again after `stop`, at the same address, knowing nothing of earlier sessions."""
        options = WorkerOptions(self.roots, self.name, memory=self.memory, settings=self.settings, loras=self.loras)
        self.worker = listening_worker(self.address, options, self.plugins)
        self.address = self.worker.listener.address
        self._thread = threading.Thread(target=self.worker.serve, name=self.name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it; AssertionError if it does not end."""
        self.worker.stop()
        self._thread.join(timeout=20)
        assert not self._thread.is_alive(), f"{self.name} does not stop"

    def restart(self) -> None:
        """`stop` and `start`."""
        self.stop()
        self.start()


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
    """``n`` workers, w0, w1 and so on, over the checkpoints in ``folder``.

    Keys, and LoRAs that arrive, are kept in MESH_HOME: see `mesh_home`.

    Args:
        scheme: of a transport whose ``SCHEME://`` listens anywhere; ``mesh`` listens on the loopback.
        plugins: by default all that are installed. Over ``inproc``, hosts must use the same object.
        memory: bytes for weights, of each.
    """
    roots = (folder,) if isinstance(folder, Path) else tuple(folder)
    plugins = plugins or load_plugins()
    address = "mesh://127.0.0.1:0" if scheme == "mesh" else f"{scheme}://"
    workers: list[ThreadWorker] = []
    try:
        for i in range(n):
            workers.append(ThreadWorker(roots, plugins, f"w{i}", address, settings or Settings(), memory))
        yield workers
    finally:
        for worker in workers:
            worker.stop()
