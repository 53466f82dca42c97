"""Entry point: registers the Klein adapter."""

from __future__ import annotations

from collections.abc import Callable

from mesh_core.hookspecs import hookimpl
from mesh_core.model import ModelAdapter


@hookimpl
def mesh_register_adapters(register: Callable[[ModelAdapter], None]) -> None:
    from mesh_klein.adapter import KleinAdapter

    register(KleinAdapter())
