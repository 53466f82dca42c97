"""What ZeroMQ needs once per process: a context, and the thread that says who may connect."""

from __future__ import annotations

import os
from threading import Lock

import zmq

from mesh_core.transport.curve import ZapHandler
from mesh_core.transport.zmq_socket import LINGER_MS, Context


class ZmqProcess:
    """What one process runs for a transport: a context and, from the first listener on, its ZAP handler."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.context: Context = zmq.Context()
        self._zap: ZapHandler | None = None
        self._lock = Lock()

    def zap(self) -> ZapHandler:
        """The handler that all listeners of the context share."""
        with self._lock:
            if self._zap is None:
                self._zap = ZapHandler(self.context)
            return self._zap

    def close(self) -> None:
        """End the threads and the context; does nothing the second time, or in a fork."""
        if self.process == os.getpid() and not self.context.closed:
            if self._zap is not None:
                self._zap.close()
            self.context.destroy(linger=LINGER_MS)
