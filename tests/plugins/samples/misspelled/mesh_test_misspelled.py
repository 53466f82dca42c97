"""Two mistakes that would otherwise pass in silence: a name that is no hook, and hooks that are not marked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mesh_core import hookimpl


@hookimpl
def mesh_register_adaptors(register: Callable[[Any], None]) -> None:
    raise AssertionError("called although it is no hook")


class Unmarked:
    def mesh_register_adapters(self, register: Callable[[Any], None]) -> None:
        raise AssertionError("called although it is not marked")
