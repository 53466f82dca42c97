"""What the nodes show while they work: workers and their state, the last step, the codec. Sent to every open page.

Holds plain values only, which become visible text when they are sent; knows no session. The page asks for all of it
when it loads, and hears of changes by event.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from time import monotonic, time
from typing import TYPE_CHECKING, Any

from mesh_core.errors import NotAuthorised
from mesh_core.host.progress import Activity, Phase
from mesh_core.visible import visible_values

if TYPE_CHECKING:
    from mesh_core.crossing.stats import StepStats

EVENT = "mesh.status"
_PAUSE = 0.2
"""Seconds between two events about progress of the same node."""

Send = Callable[[str, Mapping[str, Any]], None]


class NodeState(str, Enum):
    """Of a node: the values are what the page is sent."""

    CONNECTED = "connected"
    LOADING = "loading"
    LOST = "lost"
    FAILED = "failed"
    WRONG_KEY = "wrong key"
    LOCAL = "local"


@dataclass
class NodeStatus:
    """One node.

    Attributes:
        since: when it came into its state, in seconds since 1970.
        done, total: of what it does, in ``unit`` (bytes or seconds); total is 0 where nobody knows it.
        held: bytes of the transformer's weights on this machine; ``bytes_read``: from its file, if it is read in parts.
    """

    node: str
    state: NodeState = NodeState.CONNECTED
    detail: str = ""
    since: float = field(default_factory=time)
    done: int = 0
    total: int = 0
    unit: str = "bytes"
    blocks: int = 0
    local: int = 0
    held: int = 0
    bytes_read: int = 0
    workers: list[dict[str, Any]] = field(default_factory=list)
    codec: str = ""
    reason: str = ""
    step: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    reconnects: int = 0


class Statuses:
    """The nodes of this process. Called from the thread that runs prompts and from the server's."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._nodes: dict[str, NodeStatus] = {}
        self._lock = threading.Lock()
        self._told: dict[str, float] = {}

    def all(self) -> dict[str, Any]:
        """Every node's values by its id, as JSON takes them."""
        with self._lock:
            return {node: visible_values(vars(status)) for node, status in self._nodes.items()}

    def start(self, node: str, workers: Sequence[Mapping[str, Any]], blocks: int, local: int) -> None:
        """The node begins anew with these workers; ``local`` of the ``blocks`` run here."""
        with self._lock:
            listed = [dict(worker) for worker in workers]
            self._nodes[node] = NodeStatus(node, blocks=blocks, local=local, workers=listed)
        self._tell(node)

    def holds(self, node: str, held: int, bytes_read: int) -> None:
        """How many bytes of weights are on this machine for the node, and how many were read for it."""
        with self._lock:
            self._nodes[node].held, self._nodes[node].bytes_read = held, bytes_read

    def change(
        self, node: str, state: NodeState, detail: str = "", done: int = 0, total: int = 0, unit: str = "bytes"
    ) -> None:
        """The node is in ``state`` now; ``detail`` is for people."""
        with self._lock:
            status = self._nodes.setdefault(node, NodeStatus(node))
            new = state != status.state or (detail != status.detail and state is not NodeState.LOADING)
            if new and not (state is status.state is NodeState.LOST):
                status.since = time()
            status.state, status.detail = state, detail
            status.done, status.total, status.unit = done, total, unit
        self._tell(node, often=not new and done < total)

    def show(self, node: str, activity: Activity) -> None:
        """What a worker does, or that it is lost and waited for."""
        lost = activity.phase is Phase.WAITING
        state, detail = (NodeState.LOST, activity.subject) if lost else (NodeState.LOADING, activity.words)
        self.change(node, state, detail, activity.done, activity.total, activity.unit)

    def fail(self, node: str, error: Exception) -> None:
        """What the node did ended with ``error``."""
        self.change(node, NodeState.WRONG_KEY if isinstance(error, NotAuthorised) else NodeState.FAILED, str(error))

    def step(self, node: str, step: StepStats, reconnects: int) -> None:
        """A step came back."""
        with self._lock:
            status = self._nodes.setdefault(node, NodeStatus(node))
            status.state, status.detail, status.steps, status.reconnects = (
                NodeState.CONNECTED,
                "",
                step.step,
                reconnects,
            )
            status.codec, status.reason, status.step = step.codec, step.reason, split_of(step)
        self._tell(node)

    def _tell(self, node: str, often: bool = False) -> None:
        now = monotonic()
        if often and now - self._told.get(node, 0.0) < _PAUSE:
            return
        self._told[node] = now
        with self._lock:
            values = visible_values(vars(self._nodes[node]))
        self._send(EVENT, values)


def split_of(step: StepStats) -> dict[str, Any]:
    """Where the time of a step went, in milliseconds, and what crossed, in bytes."""
    codec = step.encode_ms + step.decode_ms + sum(h.encode_ms + h.decode_ms for h in step.hops)
    compute = sum(h.compute_ms for h in step.hops)
    back = step.hops[-1].out_coded if step.hops else 0
    return {
        "total_ms": step.total_ms + step.local_ms,
        "local_ms": step.local_ms,
        "remote_ms": compute,
        "codec_ms": codec,
        "wire_ms": step.wire_ms,
        "other_ms": max(step.total_ms - compute - codec - step.wire_ms, 0.0),
        "bytes": sum(h.in_coded for h in step.hops) + back,
        "raw_bytes": sum(h.in_raw for h in step.hops) + (step.hops[-1].out_raw if step.hops else 0),
        "resent": step.resent,
    }
