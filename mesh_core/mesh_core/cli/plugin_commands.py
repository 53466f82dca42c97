"""The commands that plugins add: finding one, and what became of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from mesh_core.cli.commands import COMMANDS
from mesh_core.errors import PluginConflict, PluginNotFound
from mesh_core.plugins.report import CORE, FIRST, ONE_OF_THEM, conflict, contention

_REGISTERING = ("mesh_register_", "mesh_add_")

if TYPE_CHECKING:
    from mesh_core.plugins.registry import Plugins
    from mesh_core.plugins.report import PluginReport


def plugin_command(name: str) -> click.Command | None:
    """The command ``name`` that an installed plugin adds, or None.

    Raises:
        PluginConflict: more than one plugin adds it, none of which is the core's.
        PluginNotFound: it comes with the core, and the core's plugin is not in use.
    """
    from mesh_core.builtin import installed_plugins

    plugins = installed_plugins()
    # What the core lists as its own is nobody else's; importing the others, and torch with them, takes seconds.
    own = [report for report in plugins.known() if report.distribution == CORE] if name in COMMANDS else []
    for commands in _added(plugins, own).values():
        if name in commands:
            return commands[name]
    reports = plugins.report()
    found = {owner: commands[name] for owner, commands in _added(plugins, reports).items() if name in commands}
    rivals = [report for report in reports if report.name in found]
    first = [report for report in rivals if report.distribution in FIRST]
    if len(rivals) > 1 and not first:
        raise PluginConflict(contention(f"command {name!r}", rivals), hint=ONE_OF_THEM)
    if not found and name in COMMANDS:
        raise PluginNotFound(
            f"The plugin of {CORE} that adds the command {name!r} is not in use.",
            hint=f"mesh plugins says why; where it is not listed, install {CORE} anew",
        )
    return found[(first or rivals)[0].name] if found else None


def full_report(plugins: Plugins) -> list[PluginReport]:
    """`Plugins.report` with the hooks that plugins answer and the commands that they add or contend for."""
    reports = [_with_hooks(report, plugins) for report in plugins.report()]
    added = _added(plugins, reports)
    return [_with_commands(report, added, reports) for report in reports]


def _with_hooks(report: PluginReport, plugins: Plugins) -> PluginReport:
    # What is registered is listed by its own name.
    hooks = [f"hook {hook}" for hook in plugins.hooks_of(report.name) if not hook.startswith(_REGISTERING)]
    return replace(report, provides=(*report.provides, *hooks))


def _with_commands(
    report: PluginReport, added: dict[str, dict[str, click.Command]], reports: list[PluginReport]
) -> PluginReport:
    if report.status == "broken" or report.name not in added:
        return report
    for command in added[report.name]:
        rivals = [r for r in reports if command in added.get(r.name, ())]
        if command in COMMANDS and COMMANDS[command].target:
            rivals = [reports[0], report]
        if len(rivals) > 1 and report.distribution not in FIRST:
            report = conflict(report, f"command {command!r}", rivals)
        else:
            report = replace(report, provides=(*report.provides, f"command {command}"))
    return report


def _added(plugins: Plugins, reports: Sequence[PluginReport]) -> dict[str, dict[str, click.Command]]:
    """The commands of some plugins, by the name of the plugin that adds them."""
    added: dict[str, dict[str, click.Command]] = {}
    for report in reports:
        group = click.Group()
        plugins.call_one(report.name, "mesh_add_commands", cli=group)
        if group.commands:
            added[report.name] = dict(group.commands)
    return added
