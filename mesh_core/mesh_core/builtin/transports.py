"""The built-in ``mesh_register_transports``: inside a process, and ZeroMQ with and without encryption."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mesh_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from mesh_core.transport.base import Transport


class CoreTransports:
    """Imports each transport only when it is registered."""

    @hookimpl
    def mesh_register_transports(self, register: Callable[[Transport], None]) -> None:
        from mesh_core.transport.inproc import InprocTransport
        from mesh_core.transport.zeromq import ZeroMqTransport

        register(InprocTransport())
        register(ZeroMqTransport())
