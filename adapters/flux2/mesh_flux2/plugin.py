"""Entry point: registers the FLUX.2 Dev adapter."""

from __future__ import annotations

from collections.abc import Callable

from mesh_core.hookspecs import hookimpl
from mesh_core.model import ModelAdapter


@hookimpl
def mesh_register_adapters(register: Callable[[ModelAdapter], None]) -> None:
    from mesh_flux2.adapter import Flux2Adapter

    register(Flux2Adapter())
