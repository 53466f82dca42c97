"""Finds, loads and reports plugins: distributions with entry points in the group ``mesh.v1``.

Reading what is installed imports nothing; the plugins' modules are imported when a hook or a registered object is
first asked for. A plugin that fails is reported and left out; the others keep working. This module must not know
any adapter, codec or transport by name.
"""

from __future__ import annotations

import importlib
import re
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from threading import RLock
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pluggy

from mesh_core import __version__, hookspecs
from mesh_core.errors import PluginBroken, PluginConflict, PluginError, PluginIncompatible, PluginNotFound
from mesh_core.plugins.report import (
    CORE,
    FIRST,
    ONE_OF_THEM,
    PluginReport,
    Status,
    conflict,
    contention,
    describe,
    disabled,
    incompatible,
    one_line,
)
from mesh_core.system.config import Settings

if TYPE_CHECKING:
    from mesh_codec.base import Codec
    from mesh_core.model.adapter import ModelAdapter
    from mesh_core.transport.base import Transport

_GROUP = re.compile(rf"{hookspecs.PROJECT}\.v(\d+)")
_PIP_NAME = re.compile(r"[a-z0-9]+([-_.][a-z0-9]+)*")

Kind = Literal["adapter", "codec", "transport"]


class _Contract(NamedTuple):
    """How objects of a kind reach the core: the hook, the class that they must be of, the attribute that names them."""

    hook: str
    base: str
    name: str


_CONTRACTS: Mapping[Kind, _Contract] = {
    "adapter": _Contract("mesh_register_adapters", "mesh_core.model.adapter:ModelAdapter", "family"),
    "codec": _Contract("mesh_register_codecs", "mesh_codec.base:Codec", "name"),
    "transport": _Contract("mesh_register_transports", "mesh_core.transport.base:Transport", "scheme"),
}


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
        self._disabled = frozenset(disabled)
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._reports: dict[str, PluginReport] = {}
        self._set_aside: list[PluginReport] = []
        self._pending: dict[str, EntryPoint] = {}
        self._objects: dict[tuple[Kind, str], tuple[str, Any]] = {}
        self._conflicts: dict[tuple[Kind, str], str] = {}
        self._collected = False
        for name, plugin in builtin.items():
            self._manager.register(plugin, name)
            self._reports[name] = PluginReport(name, CORE, __version__)
        self._sort(installed)

    @classmethod
    def load(cls, builtin: Mapping[str, object], disabled: Iterable[str] | None = None) -> Plugins:
        """``builtin`` and what is installed; ``disabled`` is by default what the settings say.

        Raises:
            ConfigError: the settings file is damaged.
        """
        found = entry_points()
        groups = sorted(group for group in found.groups if _GROUP.fullmatch(group))
        installed = [point for group in groups for point in found.select(group=group)]
        return cls(builtin, installed, Settings.load().plugins.disabled if disabled is None else disabled)

    @property
    def hook(self) -> Any:
        """The hooks of hookspecs.py, to be called with keyword arguments."""
        self._import()
        return self._manager.hook

    def adapters(self) -> dict[str, ModelAdapter]:
        """The model adapters in use, by family."""
        return self._of("adapter")

    def codecs(self) -> dict[str, Codec]:
        """The codecs in use, by name."""
        return self._of("codec")

    def transports(self) -> dict[str, Transport]:
        """The transports in use, by the scheme of the addresses that they serve."""
        return self._of("transport")

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
        return {family: self._reports[self._objects["adapter", family][0]].version for family in self.adapters()}

    def report(self) -> list[PluginReport]:
        """What became of every plugin, built-in ones first. Loads all of them, to tell the truth."""
        self._collect()
        return [*self._reports.values(), *self._set_aside]

    def call_one(self, name: str, hook: str, **arguments: Any) -> list[Any]:
        """Call ``hook`` of one plugin alone and return its results; none if it is not in use.

        A plugin that raises is reported as broken and taken out of use.
        """
        with self._lock:
            self._import()
            if not self._manager.has_plugin(name):
                return []
            try:
                return self._call(name, hook, arguments)
            except (Exception, SystemExit) as error:
                self._break(name, f"{hook} raised {one_line(error)}", error)
                return []

    def _sort(self, installed: Iterable[EntryPoint]) -> None:
        """Decide from metadata alone which entry points may be imported."""
        claims: dict[str, list[PluginReport]] = {}
        points: dict[str, EntryPoint] = {}
        for point in installed:
            report = describe(point)
            major = int(point.group.rpartition(".v")[2])
            if major != hookspecs.API_MAJOR:
                self._set_aside.append(incompatible(report, major))
            elif point.name in self._disabled:
                self._set_aside.append(disabled(report))
            else:
                claims.setdefault(point.name, []).append(report)
                points[point.name] = point
        for name, reports in claims.items():
            rivals = [*reports, *([self._reports[name]] if name in self._reports else [])]
            if len(rivals) == 1:
                self._pending[name] = points[name]
                self._reports[name] = rivals[0]
            else:
                self._set_aside += [conflict(r, f"plugin {name!r}", rivals) for r in reports]

    def _import(self) -> None:
        """Import the plugins that may be, and register their hooks."""
        with self._lock:
            while self._pending:
                name = next(iter(self._pending))
                point = self._pending.pop(name)
                try:
                    plugin = point.load()
                    self._manager.register(plugin, name)
                    self._check_hooks(name, plugin)
                except PluginBroken as error:
                    self._break(name, error.message, None, error.hint)
                except (Exception, SystemExit) as error:
                    self._break(name, f"{point.value} raised {one_line(error)}", error)

    def _check_hooks(self, name: str, plugin: object) -> None:
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

    def _break(self, name: str, detail: str, error: BaseException | None, hint: str = "") -> None:
        if self._manager.has_plugin(name):
            self._manager.unregister(name=name)
        for key in [key for key, (owner, _) in self._objects.items() if owner == name]:
            del self._objects[key]
        self._reports[name] = replace(
            self._reports[name],
            status="broken",
            provides=(),
            detail=detail,
            hint=hint or f"pip install --upgrade {self._reports[name].distribution}",
            traceback="".join(traceback.format_exception(error)) if error else "",
        )

    def _call(self, name: str, hook: str, arguments: Mapping[str, Any]) -> list[Any]:
        others = [plugin for other, plugin in self._manager.list_name_plugin() if other != name and plugin]
        caller = self._manager.subset_hook_caller(hook, others)
        result = caller(**arguments)
        return result if isinstance(result, list) else [result]

    def _collect(self) -> None:
        """Let every plugin register its objects; settle names that more than one claims."""
        with self._lock:
            self._import()
            if self._collected:
                return
            claims: dict[tuple[Kind, str], list[tuple[str, Any]]] = {}
            for name in list(self._reports):
                for kind, key, item in self._offers(name):
                    claims.setdefault((kind, key), []).append((name, item))
            for (kind, key), claimants in claims.items():
                self._settle(kind, key, claimants)
            self._collected = True

    def _offers(self, name: str) -> list[tuple[Kind, str, Any]]:
        """What one plugin registers; nothing if it fails at that."""
        if not self._manager.has_plugin(name):
            return []
        offers: list[tuple[Kind, str, Any]] = []
        try:
            for kind, contract in _CONTRACTS.items():
                found: list[Any] = []
                self._call(name, contract.hook, {"register": found.append})
                offers += [(kind, _name_of(item, contract), item) for item in found]
        except (Exception, SystemExit) as error:
            self._break(name, f"It failed to register: {one_line(error)}", error)
            return []
        return offers

    def _settle(self, kind: Kind, key: str, claimants: list[tuple[str, Any]]) -> None:
        reports = [self._reports[name] for name, _ in claimants]
        core = [claim for claim, report in zip(claimants, reports, strict=True) if report.distribution in FIRST]
        if len(claimants) == 1 or core:
            owner, item = (core or claimants)[0]
            self._objects[kind, key] = owner, item
            before = self._reports[owner]
            self._reports[owner] = replace(before, provides=(*before.provides, f"{kind} {key}"))
        else:
            self._conflicts[kind, key] = contention(f"{kind} {key!r}", reports)
        if len(claimants) > 1:
            for (name, _), report in zip(claimants, reports, strict=True):
                if not core or report.distribution not in FIRST:
                    told = conflict(report, f"{kind} {key!r}", reports)
                    self._reports[name] = replace(told, provides=self._reports[name].provides)

    def _of(self, kind: Kind) -> dict[str, Any]:
        self._collect()
        return {key: item for (k, key), (_, item) in self._objects.items() if k == kind}

    def _get(self, kind: Kind, key: str) -> Any:
        found = self._of(kind)
        if key in found:
            return found[key]
        raise self._why_not(kind, key, found)

    def _why_not(self, kind: Kind, key: str, found: Mapping[str, Any]) -> PluginError:
        if (kind, key) in self._conflicts:
            return PluginConflict(self._conflicts[kind, key], hint=ONE_OF_THEM)
        for report in [*self._reports.values(), *self._set_aside]:
            failure = _FAILURES.get(report.status)
            if report.name == key and failure:
                return failure(f"{kind.capitalize()} {key!r} ({report.label}): {report.detail}", hint=report.hint)
        owners = {k: self._reports[self._objects[kind, k][0]] for k in found}
        listed = ", ".join(f"{k} {owner.version}" for k, owner in sorted(owners.items())) or "none"
        if kind == "adapter" and _PIP_NAME.fullmatch(key):
            hint = f"pip install {CORE}-{key}"
        else:
            hint = f"one of these, or the package that brings {key!r}; mesh plugins shows what failed to load"
        return PluginNotFound(f"No {kind} for {key!r}. Installed: {listed}.", hint=hint)


_FAILURES: Mapping[Status, type[PluginError]] = {
    "disabled": PluginNotFound,
    "broken": PluginBroken,
    "conflict": PluginConflict,
    "incompatible": PluginIncompatible,
}


def _name_of(item: object, contract: _Contract) -> str:
    """The name under which a registered object is known; it must be an instance of the contract's class."""
    module, _, attribute = contract.base.partition(":")
    base = getattr(importlib.import_module(module), attribute)
    name = getattr(item, contract.name, None)
    if not isinstance(item, base) or not isinstance(name, str) or not name:
        raise TypeError(f"{contract.hook} takes instances of {attribute} with a {contract.name}, not {item!r}")
    return name
