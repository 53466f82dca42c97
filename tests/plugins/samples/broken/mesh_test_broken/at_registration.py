"""Imports well; registers the class where an instance is due."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mesh_core import hookimpl
from mesh_core.transport.base import Transport


@hookimpl
def mesh_register_transports(register: Callable[[Any], None]) -> None:
    register(Transport)
