"""A session as its worker holds it, and the constants that sessions share. Knows no sockets."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from mesh_core.crossing.streams import Streams
from mesh_core.errors import ConstantsMissing, WireTooLarge
from mesh_core.model.library import Checkpoint
from mesh_core.transport.base import Channel
from mesh_core.worker.stages import Loaded


@dataclass(frozen=True)
class Quota:
    """What one host may take of a worker, so that the others get their share.

    Attributes:
        sessions: open at once; of more, the one that was silent for longest is forgotten.
        steps: that wait, of one session.
        requests: to load or list checkpoints, that wait.
        neighbours: that were admitted for one session.
    """

    sessions: int = 32
    steps: int = 8
    requests: int = 16
    neighbours: int = 8


QUOTA = Quota()


@dataclass
class HostedSession:
    """One host's use of one stage.

    Attributes:
        owner: public key of the host that opened it; nobody else may use it, but for ``neighbours``.
        route: where results go; follows the owner when it reconnects.
        checkpoint: that the stage is a span of.
        next: channel to the worker that continues, and the session there; None at the end of a chain.
    """

    id: bytes
    owner: str
    route: bytes
    loaded: Loaded
    inputs: Streams
    outputs: Streams
    checkpoint: Checkpoint
    next: Channel | None = None
    next_session: bytes = b""
    neighbours: set[str] = field(default_factory=set)
    attempt: int = 0
    last_seen: float = field(default_factory=monotonic)

    def restart_streams(self, attempt: int) -> None:
        """A step that is sent again starts every stream at a key frame, at both ends."""
        if attempt != self.attempt:
            self.attempt = attempt
            self.inputs.reset()
            self.outputs.reset()

    def close(self) -> None:
        if self.next is not None:
            self.next.close()


class ConstantsCache:
    """Tensors by the hash of their content, on one device, least recently used first out. Thread-safe.

    Args:
        limit: bytes kept.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self._device, self._limit = device, limit
        self._held: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(t.nbytes for t in self._held.values())

    def put(self, digest: str, tensor: Tensor) -> None:
        """Keep ``tensor`` (already on the device).

        Raises:
            WireTooLarge: it alone is over the limit.
        """
        if tensor.nbytes > self._limit:
            raise WireTooLarge(
                f"A constant of {tensor.nbytes / 1e6:.0f} MB is over the worker's cache of {self._limit / 1e6:.0f} MB.",
                hint="a larger [worker] constants_cache in the worker's config.toml",
            )
        with self._lock:
            self._held[digest] = tensor
            self._held.move_to_end(digest)
            while sum(t.nbytes for t in self._held.values()) > self._limit:
                self._held.popitem(last=False)

    def get(self, wanted: dict[str, Any]) -> dict[str, Tensor]:
        """The tensors for ``name -> hash``.

        Raises:
            ConstantsMissing: some are not here (any more); the host sends them again.
        """
        with self._lock:
            missing = sorted(name for name, digest in wanted.items() if digest not in self._held)
            if missing:
                raise ConstantsMissing(
                    f"Constants not here: {', '.join(missing)}.",
                    hint="if sending them again does not help, a larger [worker] constants_cache in its config.toml",
                )
            for digest in wanted.values():
                self._held.move_to_end(digest)
            return {name: self._held[digest] for name, digest in wanted.items()}
