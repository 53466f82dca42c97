"""The plugins of a process: distributions with entry points in the group ``mesh.v1``, and the core's own.

Reading what is installed imports nothing; the plugins' modules are imported when a hook or a registered object is
first asked for. Knows no adapter, codec or transport by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint
from threading import RLock
from typing import TYPE_CHECKING, Any

import pluggy

from mesh_core import __version__, hookspecs
from mesh_core.plugins.found import installed_entry_points, sort_out
from mesh_core.plugins.loader import PluginLoader
from mesh_core.plugins.objects import Kind, PluginObjects
from mesh_core.plugins.report import CORE, PluginReport, one_line
from mesh_core.system.config import Settings

if TYPE_CHECKING:
    from mesh_codec.base import Codec
    from mesh_core.model.adapter import ModelAdapter
    from mesh_core.model.stored import WeightFormat
    from mesh_core.transport.base import Transport


class Plugins:
    """What is installed and how it fared. Any thread may use it."""

    def __init__(
        self, builtin: Mapping[str, object], installed: Iterable[EntryPoint], disabled: Iterable[str] = ()
    ) -> None:
        """Use `mesh_core.builtin.load_plugins` for the plugins of this environment.

        Args:
            builtin: the core's own plugins by name, which are registered first.
            installed: entry points of any group ``mesh.v<major>``.
            disabled: names of entry points that are not to be imported.
        """
        self._lock = RLock()
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._reports: dict[str, PluginReport] = {}
        for name, plugin in builtin.items():
            self._manager.register(plugin, name)
            self._reports[name] = PluginReport(name, CORE, __version__)
        found = sort_out(installed, frozenset(disabled), self._reports)
        self._reports |= found.reports
        self._set_aside = found.set_aside
        self._loader = PluginLoader(self._manager, self._reports, found.usable)
        self._objects = PluginObjects(self._loader)

    @classmethod
    def load(cls, builtin: Mapping[str, object], disabled: Iterable[str] | None = None) -> Plugins:
        """``builtin`` and what is installed; ``disabled`` is by default what the settings say.

        Raises:
            ConfigError: the settings file is damaged.
        """
        installed = installed_entry_points()
        return cls(builtin, installed, Settings.load().plugins.disabled if disabled is None else disabled)

    @property
    def hook(self) -> Any:
        """The hooks of hookspecs.py, to be called with keyword arguments."""
        with self._lock:
            self._loader.load()
        return self._manager.hook

    def adapters(self) -> dict[str, ModelAdapter]:
        """The model adapters in use, by family."""
        return self._collected().of("adapter")

    def codecs(self) -> dict[str, Codec]:
        """The codecs in use, by name."""
        return self._collected().of("codec")

    def weight_formats(self) -> dict[str, WeightFormat]:
        """The ways to store weights that are read, by name."""
        return self._collected().of("weight format")

    def adapter(self, family: str) -> ModelAdapter:
        """The adapter of a model family.

        Raises:
            PluginNotFound: nothing installed, or nothing enabled, answers to that name.
            PluginConflict, PluginBroken, PluginIncompatible: something does, but it cannot be used.
        """
        adapter: ModelAdapter = self._get("adapter", family)
        return adapter

    def codec(self, name: str) -> Codec:
        """A codec; raises as `adapter` does."""
        codec: Codec = self._get("codec", name)
        return codec

    def transport(self, scheme: str) -> Transport:
        """The transport for addresses ``scheme://``; raises as `adapter` does."""
        transport: Transport = self._get("transport", scheme)
        return transport

    def versions(self) -> dict[str, str]:
        """Distributions in use and their versions, the core included: what two ends tell each other."""
        return {r.distribution: r.version for r in self.report() if r.status == "loaded"}

    def adapter_versions(self) -> dict[str, str]:
        """Model families in use and the versions of the distributions that they come from."""
        return {family: self._objects.owner("adapter", family).version for family in self.adapters()}

    def report(self) -> list[PluginReport]:
        """What became of every plugin, built-in ones first. Loads all of them, to tell the truth."""
        self._collected()
        return self.known()

    def known(self) -> list[PluginReport]:
        """As `report`, but imports nothing: what is known so far."""
        return [*self._reports.values(), *self._set_aside]

    def hooks_of(self, name: str) -> list[str]:
        """The hooks that a plugin answers, sorted; none if it is not in use."""
        with self._lock:
            self._loader.load()
            plugin = self._manager.get_plugin(name)
            return sorted(caller.name for caller in self._manager.get_hookcallers(plugin) or [])

    def call_one(self, name: str, hook: str, **arguments: Any) -> list[Any]:
        """Call ``hook`` of one plugin alone, importing no other, and return its results; none if it is not in use.

        A plugin that raises is reported as broken and taken out of use.
        """
        with self._lock:
            self._loader.load_one(name)
            if not self._loader.in_use(name):
                return []
            try:
                return self._loader.call(name, hook, arguments)
            except (Exception, SystemExit) as error:
                self._loader.take_out(name, f"{hook} raised {one_line(error)}", error)
                self._objects.drop(name)
                return []

    def _collected(self) -> PluginObjects:
        with self._lock:
            self._loader.load()
            self._objects.collect()
            return self._objects

    def _get(self, kind: Kind, key: str) -> Any:
        objects = self._collected()
        found = objects.of(kind)
        if key not in found:
            raise objects.why_not(kind, key, self._set_aside)
        return found[key]
