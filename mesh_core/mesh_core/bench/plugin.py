"""Entry point ``mesh.v1``: adds ``mesh bench``, as anybody's plugin adds a command. Imports no measurement."""

from __future__ import annotations

import click

from mesh_core.hookspecs import hookimpl


@hookimpl
def mesh_add_commands(cli: click.Group) -> None:
    """Adds the group; what it measures is imported by each command."""
    from mesh_core.bench.commands import bench

    cli.add_command(bench)
