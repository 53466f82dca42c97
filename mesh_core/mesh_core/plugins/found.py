"""Which of the installed entry points may be imported, decided from their metadata alone. Imports no plugin."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points

from mesh_core import hookspecs
from mesh_core.plugins.report import PluginReport, conflict, describe, disabled, incompatible

_GROUP = re.compile(rf"{hookspecs.PROJECT}\.v(\d+)")


@dataclass
class Found:
    """What was found, by name.

    Attributes:
        usable: entry points that may be imported.
        reports: on these; nothing is wrong with them so far.
        set_aside: reports on all others, which are never imported.
    """

    usable: dict[str, EntryPoint] = field(default_factory=dict)
    reports: dict[str, PluginReport] = field(default_factory=dict)
    set_aside: list[PluginReport] = field(default_factory=list)


def installed_entry_points() -> list[EntryPoint]:
    """Those of this environment in the groups ``mesh.v<major>`` of any major version."""
    found = entry_points()
    groups = sorted(group for group in found.groups if _GROUP.fullmatch(group))
    return [point for group in groups for point in found.select(group=group)]


def sort_out(
    installed: Iterable[EntryPoint], switched_off: Collection[str], taken: Mapping[str, PluginReport]
) -> Found:
    """Tell those that may be imported from those that were made for other hooks, switched off, or claim one name.

    Args:
        switched_off: names that the user disabled.
        taken: names of the core's own plugins.
    """
    found = Found()
    claims: dict[str, list[PluginReport]] = {}
    points: dict[str, EntryPoint] = {}
    for point in installed:
        report = describe(point)
        major = int(point.group.rpartition(".v")[2])
        if major != hookspecs.API_MAJOR:
            found.set_aside.append(incompatible(report, major))
        elif point.name in switched_off:
            found.set_aside.append(disabled(report))
        else:
            claims.setdefault(point.name, []).append(report)
            points[point.name] = point
    for name, reports in claims.items():
        rivals = [*reports, *([taken[name]] if name in taken else [])]
        if len(rivals) == 1:
            found.usable[name] = points[name]
            found.reports[name] = rivals[0]
        else:
            found.set_aside += [conflict(r, f"plugin {name!r}", rivals) for r in reports]
    return found
