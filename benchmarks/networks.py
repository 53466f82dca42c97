"""Two places with a link of a chosen rate between them, made for a benchmark and gone after it.

Where the system is Linux, the user is root and ``ip`` and ``tc`` are there: two network namespaces, a virtual cable and
a token bucket at either end. Elsewhere both places are this machine, and a relay in user space shapes the link. The
machine's own network is never touched.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import psutil

from benchmarks.shaper import Shaper
from mesh_core.errors import ConfigError, TransportError

_HOST, _WORKER = "10.213.77.1", "10.213.77.2"
"""Inside the namespaces; nobody else sees them."""

_PREFIX = "mesh-bench-"

_QUEUE_SECONDS = 0.05
_LEAST_BURST = 128 << 10
"""Bytes. Must hold the segments of 64 KiB that the system sends."""


class Network(ABC):
    """Where the two ends run, and how one reaches the other.

    Attributes:
        kind: what shapes the link, for the table.
        host_prefix, worker_prefix: what is to run the processes of each end.
        bind: the address at which a worker listens.
    """

    kind: str
    host_prefix: Sequence[str] = ()
    worker_prefix: Sequence[str] = ()
    bind: str = "127.0.0.1"

    @abstractmethod
    def reach(self, address: str) -> str:
        """The address under which the host reaches a worker that listens at ``address``."""


class _Namespaces(Network):
    kind = "network namespaces, tc tbf"
    bind = _WORKER

    def __init__(self, names: tuple[str, str]) -> None:
        self.host_prefix, self.worker_prefix = (("ip", "netns", "exec", name) for name in names)

    def reach(self, address: str) -> str:
        return address


class _Relayed(Network):
    kind = "relay in user space"

    def __init__(self, rate: float, stack: ExitStack) -> None:
        self._rate, self._stack = rate, stack

    def reach(self, address: str) -> str:
        host, _, port = address.removeprefix("mesh://").rpartition(":")
        shaper = self._stack.enter_context(Shaper(host, int(port), self._rate))
        return f"mesh://127.0.0.1:{shaper.port}"


def namespaces_possible() -> bool:
    """Whether this system and this user can make network namespaces and shape links."""
    root = sys.platform == "linux" and os.geteuid() == 0
    return root and all(shutil.which(tool) for tool in ("ip", "tc"))


@contextmanager
def shaped(rate: float, *, relay: bool = False) -> Iterator[Network]:
    """A network of ``rate`` bytes per second each way.

    Args:
        relay: in user space even where namespaces are possible.

    Raises:
        ConfigError: the rate is none.
        TransportError: the system refused what is needed.
    """
    if rate <= 0:
        raise ConfigError(f"{rate} is no rate.", hint="1gbit")
    with _ended_like_ctrl_c(), ExitStack() as stack:
        if relay or not namespaces_possible():
            yield _Relayed(rate, stack)
        else:
            yield _Namespaces(_wire(rate, stack))


@contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """A request to end the process leaves nothing behind either."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _remove_orphans() -> None:
    """Namespaces of benchmarks that were killed."""
    listed = subprocess.run(("ip", "netns", "list"), capture_output=True, text=True, check=False).stdout
    for name, process in re.findall(rf"^({_PREFIX}(\d+)-[ab])\b", listed, re.MULTILINE):
        if not psutil.pid_exists(int(process)):
            _tool("ip", "netns", "delete", name)


def _wire(rate: float, stack: ExitStack) -> tuple[str, str]:
    _remove_orphans()
    names = f"{_PREFIX}{os.getpid()}-a", f"{_PREFIX}{os.getpid()}-b"
    for name in names:
        _tool("ip", "netns", "add", name)
        stack.callback(_tool, "ip", "netns", "delete", name)
    first, second = names
    # Born inside the namespaces: the machine's own network never sees the cable, which dies with them.
    _tool("ip", "-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second)
    burst = max(_LEAST_BURST, int(rate * 0.002))
    for name, address in ((first, _HOST), (second, _WORKER)):
        _tool("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        _tool("ip", "-n", name, "link", "set", "lo", "up")
        _tool("ip", "-n", name, "link", "set", "eth0", "up")
        limits = ["rate", f"{int(rate * 8)}bit", "burst", str(burst), "latency", f"{_QUEUE_SECONDS * 1e3:.0f}ms"]
        _tool("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", "tbf", *limits)
    return names


def _tool(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TransportError(
            f"{' '.join(command)} failed: {done.stderr.strip() or done.returncode}",
            hint="--relay, which needs no rights",
        )
