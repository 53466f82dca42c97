"""Adapters of families that this repository does not ship, as small as their models allow: for what stages carry."""

from __future__ import annotations

from collections.abc import Callable

from mesh_core.builtin import builtin_plugins
from mesh_core.hookspecs import hookimpl
from mesh_core.model import ModelAdapter
from mesh_core.plugins.registry import Plugins


class _Families:
    def __init__(self, *adapters: ModelAdapter) -> None:
        self._adapters = adapters

    @hookimpl
    def mesh_register_adapters(self, register: Callable[[ModelAdapter], None]) -> None:
        for adapter in self._adapters:
            register(adapter)


def plugins_with(*adapters: ModelAdapter) -> Plugins:
    """What is installed here, and these."""
    return Plugins.load({**builtin_plugins(), "test-families": _Families(*adapters)})
