"""Importing plugins, registering their hooks, and calling those of one plugin alone.

A plugin that fails at any of this is reported and taken out of use; the others keep working.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from importlib.metadata import EntryPoint
from typing import Any

import pluggy

from mesh_core import hookspecs
from mesh_core.errors import PluginBroken
from mesh_core.plugins.report import PluginReport, one_line


class PluginLoader:
    """Not thread-safe: whoever has it locks.

    Args:
        manager: the core's own plugins are registered with it already.
        reports: on all plugins by name; what goes wrong is noted there.
        pending: entry points that may be imported; they are when `load` is called.
    """

    def __init__(
        self, manager: pluggy.PluginManager, reports: dict[str, PluginReport], pending: Mapping[str, EntryPoint]
    ) -> None:
        self._manager, self.reports, self._pending = manager, reports, dict(pending)

    def load(self) -> None:
        """Import those that are pending, and register their hooks."""
        while self._pending:
            self.load_one(next(iter(self._pending)))

    def load_one(self, name: str) -> None:
        """As `load`, for the plugin ``name`` alone; nothing if it is not pending."""
        point = self._pending.pop(name, None)
        if point is None:
            return
        try:
            plugin = point.load()
            self._manager.register(plugin, name)
            self._check_hooks(plugin)
        except PluginBroken as error:
            self.take_out(name, error.message, None, error.hint)
        except (Exception, SystemExit) as error:
            self.take_out(name, f"{point.value} raised {one_line(error)}", error)

    def in_use(self, name: str) -> bool:
        """Whether a plugin of that name was loaded and did not fail."""
        return bool(self._manager.has_plugin(name))

    def call(self, name: str, hook: str, arguments: Mapping[str, Any]) -> list[Any]:
        """What ``hook`` of the plugin ``name`` alone returns; raises whatever the plugin raises."""
        others = [plugin for other, plugin in self._manager.list_name_plugin() if other != name and plugin]
        caller = self._manager.subset_hook_caller(hook, others)
        result = caller(**arguments)
        return result if isinstance(result, list) else [result]

    def take_out(self, name: str, detail: str, error: BaseException | None, hint: str = "") -> None:
        """Call none of its hooks any more, and report it as broken.

        Args:
            error: whose traceback the report shows; None for a mistake that needs none.
        """
        if self._manager.has_plugin(name):
            self._manager.unregister(name=name)
        self.reports[name] = replace(
            self.reports[name],
            status="broken",
            provides=(),
            detail=detail,
            hint=hint or f"pip install --upgrade {self.reports[name].distribution}",
            traceback="".join(traceback.format_exception(error)) if error else "",
        )

    def _check_hooks(self, plugin: object) -> None:
        """A name that is no hook, or no hook at all, is a mistake that would otherwise pass in silence."""
        callers = self._manager.get_hookcallers(plugin) or []
        unknown = [c.name for c in callers if not c.has_spec()]
        known = sorted(n for n in vars(hookspecs) if n.startswith("mesh_"))
        if unknown:
            close = get_close_matches(unknown[0], known, n=1)
            raise PluginBroken(
                f"It implements {', '.join(sorted(unknown))}, which is no hook of {hookspecs.ENTRY_POINT_GROUP}. "
                f"Hooks: {', '.join(known)}.",
                hint=f"rename it to {close[0]}" if close else "one of these names, or update comfyui-mesh",
            )
        if not callers:
            raise PluginBroken(
                f"It implements none of the hooks {', '.join(known)}.",
                hint="mark its functions with @mesh_core.hookimpl",
            )
