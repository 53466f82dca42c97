"""``mesh plugins``: what is installed, what it provides, and why something is not in use."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mesh_core.cli.plugin_commands import full_report
from mesh_core.system.tables import aligned
from mesh_core.system.terminal import Coloured, say, say_json

if TYPE_CHECKING:
    from mesh_core.plugins.report import PluginReport

_COLOURS = {"disabled": "yellow", "broken": "red", "conflict": "red", "incompatible": "red"}


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
        say_json({"group": ENTRY_POINT_GROUP, "plugins": [asdict(report) for report in reports]})
    else:
        _table(reports)


def _table(reports: list[PluginReport]) -> None:
    rows = [[r.name, r.label, r.status, ", ".join(r.provides)] for r in reports]
    head, *lines = aligned([["plugin", "from", "state", "provides"], *rows], left=4, widest=200)
    say(head)
    for report, line in zip(reports, lines, strict=True):
        say(Coloured(line, _COLOURS.get(report.status)))
    for report in reports:
        if report.detail:
            say()
            say(f"{report.name} ({report.label}): {report.detail}")
            say(f"  try: {report.hint}")
