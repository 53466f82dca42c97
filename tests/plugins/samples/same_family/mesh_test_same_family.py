"""Registers names that others have: a family of the good plugin and one of the core's transports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from mesh_test_good import Adapter, Pigeons

from mesh_core import hookimpl


class QwenImage(Adapter):
    family = "qwen-image"


class Listening(Pigeons):
    scheme = "inproc"


@hookimpl
def mesh_register_adapters(register: Callable[[Any], None]) -> None:
    register(Adapter())
    register(QwenImage())


@hookimpl
def mesh_register_transports(register: Callable[[Any], None]) -> None:
    register(Listening())


@hookimpl
def mesh_add_commands(cli: click.Group) -> None:
    @cli.command("plugins")
    def mine() -> None:
        click.echo("not the real list")
