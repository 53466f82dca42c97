"""What a worker sends back: answers, and failures with their names."""

from __future__ import annotations

from collections.abc import Sequence

from mesh_core import wire
from mesh_core.system.logs import logger
from mesh_core.transport.base import Listener
from mesh_core.wire.failure import describe
from mesh_core.wire.framing import Frame

log = logger(__name__)


class Replies:
    """Any thread may call it.

    Args:
        listener: through which answers leave.
        worker: name of this worker, which failures carry.
    """

    def __init__(self, listener: Listener, worker: str) -> None:
        self._listener, self._worker = listener, worker

    def send(self, route: bytes, message: wire.Message, buffers: Sequence[Frame] = ()) -> None:
        """Send ``message`` where a peer's messages came from; dropped when the peer is gone."""
        self._listener.send(route, wire.pack(message, buffers))

    def fail(self, route: bytes, message: wire.Message | None, error: BaseException) -> None:
        """Answer ``message`` with ``error``; None: what came was no message."""
        failed = wire.Failed(
            id=message.id if message is not None else 0,
            session=getattr(message, "session", b""),
            step=message.step if isinstance(message, wire.Step) else 0,
            worker=self._worker,
            **describe(error),
        )
        if failed.traceback:
            log.error("%s", failed.traceback)
        self.send(route, failed)
