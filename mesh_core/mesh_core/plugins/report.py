"""What became of a plugin, and the words for what went wrong. Knows metadata only; imports no plugin."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from typing import Literal

from mesh_core import __version__, hookspecs

CORE = "comfyui-mesh"
"""The distribution that the built-in plugins belong to."""

FIRST = frozenset({CORE, "comfyui-mesh-codec"})
"""Distributions without which nothing works: no other plugin can take a name from them."""

ONE_OF_THEM = "pip uninstall all but one of them"
"""What to do about a conflict."""

PluginStatus = Literal["loaded", "disabled", "broken", "conflict", "incompatible"]


@dataclass(frozen=True)
class PluginReport:
    """What became of one plugin.

    Attributes:
        name: of its entry point.
        distribution, version: of the package that it came in.
        status: ``loaded``: in use, with ``detail`` empty; anything else is explained by ``detail``.
        provides: what is in use of it, for example ``("codec raw",)``.
        detail: why it is not in use, or not wholly.
        hint: what the reader can do about it.
        traceback: of a broken plugin, as text.
    """

    name: str
    distribution: str
    version: str
    status: PluginStatus = "loaded"
    provides: tuple[str, ...] = ()
    detail: str = ""
    hint: str = ""
    traceback: str = ""

    @property
    def label(self) -> str:
        """Distribution and version, for messages."""
        return f"{self.distribution} {self.version}"


def describe(point: EntryPoint) -> PluginReport:
    """A report on an entry point that nothing is wrong with so far."""
    distribution = point.dist
    if distribution is None:
        return PluginReport(point.name, "unknown distribution", "")
    return PluginReport(point.name, distribution.metadata["Name"], distribution.version)


def disabled(report: PluginReport) -> PluginReport:
    """``report`` of a plugin that the user switched off."""
    return replace(
        report,
        status="disabled",
        detail="Disabled in the settings.",
        hint="take its name out of plugins.disabled in config.toml and out of MESH_DISABLE_PLUGINS",
    )


def incompatible(report: PluginReport, major: int) -> PluginReport:
    """``report`` of a plugin made for another major version of the hooks."""
    ours, newer = hookspecs.API_MAJOR, major > hookspecs.API_MAJOR
    return replace(
        report,
        status="incompatible",
        detail=f"Made for plugin API {major}; this is {CORE} {__version__} with API {ours}. It was not imported.",
        hint=f"pip install --upgrade {CORE if newer else report.distribution}",
    )


def contention(what: str, rivals: Collection[PluginReport]) -> str:
    """Says who claims ``what``, and whose claim holds: the core's own, else nobody's."""
    kept = next((r.label for r in rivals if r.distribution in FIRST), "")
    outcome = f"That of {kept} is used." if kept else "None of them is used."
    return f"The {what} is claimed by {' and by '.join(sorted(r.label for r in rivals))}. {outcome}"


def conflict(report: PluginReport, what: str, rivals: Collection[PluginReport]) -> PluginReport:
    """``report`` of one of the ``rivals`` that claim ``what``, added to what it says already."""
    detail = f"{report.detail} {contention(what, rivals)}".lstrip()
    return replace(report, status="conflict", detail=detail, hint=ONE_OF_THEM)


def one_line(error: BaseException) -> str:
    """Class and message of an exception, of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
