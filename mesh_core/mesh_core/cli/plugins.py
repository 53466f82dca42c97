"""``mesh plugins``: what is installed, what it provides, and why something is not in use."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mesh_core.cli.plugin_commands import full_report

if TYPE_CHECKING:
    from mesh_core.plugins.report import PluginReport

_COLOURS = {"loaded": "green", "disabled": "yellow", "broken": "red", "conflict": "red", "incompatible": "red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, tracebacks of broken plugins included.")
def plugins(as_json: bool) -> None:
    """List plugins, what they provide and which failed to load.

    A plugin is any installed distribution with entry points in the group mesh.v1. One that fails is listed with
    its reason, and the others keep working. To switch one off, put its name into plugins.disabled of config.toml
    or into the environment variable MESH_DISABLE_PLUGINS.
    """
    from mesh_core.builtin import installed_plugins
    from mesh_core.hookspecs import ENTRY_POINT_GROUP

    reports = full_report(installed_plugins())
    if as_json:
        listed = [asdict(report) for report in reports]
        click.echo(json.dumps({"group": ENTRY_POINT_GROUP, "plugins": listed}, indent=2))
    else:
        _table(reports)


def _table(reports: list[PluginReport]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table("plugin", "from", "state", "provides", box=None, pad_edge=False)
    for report in reports:
        state = f"[{_COLOURS[report.status]}]{report.status}[/]"
        table.add_row(escape(report.name), escape(report.label), state, escape(", ".join(report.provides)))
    console.print(table)
    for report in reports:
        if report.detail:
            console.print(f"\n[bold]{escape(report.name)}[/] ({escape(report.label)}): {escape(report.detail)}")
            console.print(f"  try: {escape(report.hint)}")
