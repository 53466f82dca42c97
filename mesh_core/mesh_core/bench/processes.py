"""The processes of a benchmark: workers of the mesh, hosts behind a slow link, the ends of a loop over bare ZeroMQ.

Each is a Python of its own that prints one line of JSON when it is ready and ends when its standard input closes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import EntryPoint
from pathlib import Path
from types import TracebackType
from typing import Any

from mesh_core.builtin import builtin_plugins
from mesh_core.errors import TransportError
from mesh_core.hookspecs import ENTRY_POINT_GROUP
from mesh_core.plugins.registry import Plugins

_STOP_AFTER = 10.0
"""Seconds that a process has to end by itself."""


def plugins() -> Plugins:
    """The codecs and the model of the benchmark, and nothing that is slow to import."""
    modules = {"codecs": "mesh_codec.plugin", "through": "mesh_core.bench.through"}
    return Plugins(builtin_plugins(), [EntryPoint(name, module, ENTRY_POINT_GROUP) for name, module in modules.items()])


class Child(AbstractContextManager["Child"]):
    """``python -m module``, told ``settings`` on its first line of input.

    Args:
        home: MESH_HOME of the process.
        prefix: what is to run the Python, for example ``ip netns exec NAME``.
        folder: where it runs, for modules that are not installed; by default as this process.
    """

    def __init__(
        self,
        module: str,
        settings: Mapping[str, Any],
        home: Path,
        prefix: Sequence[str] = (),
        folder: Path | None = None,
    ) -> None:
        self._module = module
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", module],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            # Threads that spin while they wait for each other would take the processor from the other processes.
            env={**os.environ, "MESH_HOME": str(home), "OMP_NUM_THREADS": "1"},
        )
        self.tell(settings)

    def tell(self, message: Mapping[str, Any]) -> None:
        """A line that it gets from `read_line`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Its next line.

        Raises:
            TransportError: it ended instead.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise TransportError(
                f"A process of the benchmark ended early ({self._module}, exit code {self._process.wait()}).",
                hint="what it wrote above says why",
            )
        heard: dict[str, Any] = json.loads(line)
        return heard

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_STOP_AFTER)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def read_line() -> dict[str, Any]:
    """In the child: what it is told next."""
    told: dict[str, Any] = json.loads(sys.stdin.readline())
    return told


def say(message: Mapping[str, Any]) -> None:
    """In the child: one line to the parent."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def when_input_closes(stop: Callable[[], None]) -> None:
    """In the child: call ``stop`` when the parent is done, or gone."""

    def watch() -> None:
        sys.stdin.read()
        stop()

    threading.Thread(target=watch, name="parent", daemon=True).start()
