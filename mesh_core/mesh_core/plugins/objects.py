"""The adapters, codecs and transports that plugins register, and whose is used where two claim one name."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from mesh_core.errors import PluginBroken, PluginConflict, PluginError, PluginIncompatible, PluginNotFound
from mesh_core.plugins.loader import PluginLoader
from mesh_core.plugins.report import (
    CORE,
    FIRST,
    ONE_OF_THEM,
    PluginReport,
    PluginStatus,
    conflict,
    contention,
    one_line,
)

Kind = Literal["adapter", "codec", "transport", "weight format"]

_PIP_NAME = re.compile(r"[a-z0-9]+([-_.][a-z0-9]+)*")


class _Contract(NamedTuple):
    """How objects of a kind reach the core: the hook, the class that they must be of, the attribute that names them."""

    hook: str
    base: str
    name: str


_CONTRACTS: Mapping[Kind, _Contract] = {
    "adapter": _Contract("mesh_register_adapters", "mesh_core.model.adapter:ModelAdapter", "family"),
    "codec": _Contract("mesh_register_codecs", "mesh_codec.base:Codec", "name"),
    "transport": _Contract("mesh_register_transports", "mesh_core.transport.base:Transport", "scheme"),
    "weight format": _Contract("mesh_register_weight_formats", "mesh_core.model.stored:WeightFormat", "name"),
}

_FAILURES: Mapping[PluginStatus, type[PluginError]] = {
    "disabled": PluginNotFound,
    "broken": PluginBroken,
    "conflict": PluginConflict,
    "incompatible": PluginIncompatible,
}


class PluginObjects:
    """Every plugin is asked once, by `collect`. Not thread-safe: whoever has it locks."""

    def __init__(self, loader: PluginLoader) -> None:
        self._loader = loader
        self._owned: dict[tuple[Kind, str], tuple[str, Any]] = {}
        self._conflicts: dict[tuple[Kind, str], str] = {}
        self._collected = False

    def collect(self) -> None:
        """Let every plugin register its objects; settle names that more than one claims."""
        if self._collected:
            return
        claims: dict[tuple[Kind, str], list[tuple[str, Any]]] = {}
        for name in list(self._loader.reports):
            for kind, key, item in self._offers(name):
                claims.setdefault((kind, key), []).append((name, item))
        for (kind, key), claimants in claims.items():
            self._settle(kind, key, claimants)
        self._collected = True

    def of(self, kind: Kind) -> dict[str, Any]:
        """Those of a kind that are in use, by name."""
        return {key: item for (k, key), (_, item) in self._owned.items() if k == kind}

    def owner(self, kind: Kind, key: str) -> PluginReport:
        """The plugin that an object in use comes from."""
        return self._loader.reports[self._owned[kind, key][0]]

    def drop(self, plugin: str) -> None:
        """Take out of use what that plugin registered."""
        for key in [key for key, (owner, _) in self._owned.items() if owner == plugin]:
            del self._owned[key]

    def why_not(self, kind: Kind, key: str, set_aside: list[PluginReport]) -> PluginError:
        """Why no object of that name is in use.

        Args:
            set_aside: reports on plugins that were not even imported.
        """
        if (kind, key) in self._conflicts:
            return PluginConflict(self._conflicts[kind, key], hint=ONE_OF_THEM)
        for report in [*self._loader.reports.values(), *set_aside]:
            failure = _FAILURES.get(report.status)
            if report.name == key and failure:
                return failure(f"{kind.capitalize()} {key!r} ({report.label}): {report.detail}", hint=report.hint)
        owners = {k: self.owner(kind, k) for k in self.of(kind)}
        listed = ", ".join(f"{k} {owner.version}" for k, owner in sorted(owners.items())) or "none"
        if kind == "adapter" and _PIP_NAME.fullmatch(key):
            hint = f"pip install {CORE}-{key}"
        else:
            hint = f"one of these, or the package that brings {key!r}; mesh plugins shows what failed to load"
        return PluginNotFound(f"No {kind} for {key!r}. Installed: {listed}.", hint=hint)

    def _offers(self, name: str) -> list[tuple[Kind, str, Any]]:
        """What one plugin registers; nothing if it fails at that."""
        if not self._loader.in_use(name):
            return []
        offers: list[tuple[Kind, str, Any]] = []
        try:
            for kind, contract in _CONTRACTS.items():
                found: list[Any] = []
                self._loader.call(name, contract.hook, {"register": found.append})
                offers += [(kind, _name_of(item, contract), item) for item in found]
        except (Exception, SystemExit) as error:
            self._loader.take_out(name, f"It failed to register: {one_line(error)}", error)
            return []
        return offers

    def _settle(self, kind: Kind, key: str, claimants: list[tuple[str, Any]]) -> None:
        """Use the only one, or the core's own; else none, and say so in the reports of all that claim the name."""
        book = self._loader.reports
        reports = [book[name] for name, _ in claimants]
        core = [claim for claim, report in zip(claimants, reports, strict=True) if report.distribution in FIRST]
        if len(claimants) == 1 or core:
            owner, item = (core or claimants)[0]
            self._owned[kind, key] = owner, item
            book[owner] = replace(book[owner], provides=(*book[owner].provides, f"{kind} {key}"))
        else:
            self._conflicts[kind, key] = contention(f"{kind} {key!r}", reports)
        if len(claimants) > 1:
            for (name, _), report in zip(claimants, reports, strict=True):
                if not core or report.distribution not in FIRST:
                    disputed = conflict(report, f"{kind} {key!r}", reports)
                    book[name] = replace(disputed, provides=book[name].provides)


def _name_of(item: object, contract: _Contract) -> str:
    """The name under which a registered object is known; it must be an instance of the contract's class."""
    module, _, attribute = contract.base.partition(":")
    base = getattr(importlib.import_module(module), attribute)
    name = getattr(item, contract.name, None)
    if not isinstance(item, base) or not isinstance(name, str) or not name:
        raise TypeError(f"{contract.hook} takes instances of {attribute} with a {contract.name}, not {item!r}")
    return name
