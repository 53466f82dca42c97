"""Workers for tests: in threads of this process, as anybody's tests have them, or as real ``mesh serve`` processes.

The host in a test and its workers share one MESH_HOME, so they are the same user on the same machine.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mesh_core.testing import ThreadWorker, mesh_home, thread_workers, wait_until

__all__ = ["ProcessWorker", "ThreadWorker", "mesh_home", "process_worker", "thread_workers", "wait_until"]

_STARTS_WITHIN = 120.0
_ANNOUNCED = re.compile(r"listening at (\S+)")


class ProcessWorker:
    """``mesh serve`` as a process of its own.

    Attributes:
        address: as announced.
        process: the running one; replaced by `restart`.
        log: the lines of its standard error so far.
    """

    def __init__(self, folder: Path, home: Path, options: Sequence[str], program: Sequence[str]) -> None:
        self.home = home
        self._command = [sys.executable, *program, "serve", str(folder), *options]
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
    folder: Path,
    *options: str,
    home: Path | None = None,
    settings: str = "",
    name: str = "worker",
    program: Sequence[str] = ("-m", "mesh_core.cli"),
) -> Iterator[ProcessWorker]:
    """A worker process over the checkpoints in ``folder``.

    Args:
        options: further arguments of ``mesh serve``.
        home: its MESH_HOME; by default that of this process.
        settings: text of its config.toml.
        program: what Python runs as ``mesh``.
    """
    home = home or Path(os.environ["MESH_HOME"])
    if settings:
        (home / "config").mkdir(parents=True, exist_ok=True)
        (home / "config" / "config.toml").write_text(settings, encoding="utf-8")
    worker = ProcessWorker(folder, home, ["--name", name, *options], program)
    try:
        yield worker
    finally:
        worker.kill()
