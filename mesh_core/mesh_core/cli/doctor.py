"""``mesh doctor``: is this machine ready, and are the workers that it knows?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mesh_core.system.option_types import SECONDS
from mesh_core.system.terminal import Coloured, say, say_json

if TYPE_CHECKING:
    from mesh_core.cli.findings import Finding
    from mesh_core.plugins.registry import Plugins
    from mesh_core.system.config import Settings

_COLOURS = {"ok": "green", "warn": "yellow", "FAIL": "red"}


@click.command()
@click.argument("addresses", metavar="[ADDRESS]...", nargs=-1)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    default=None,
    help="Also hash this model anew, whatever is remembered of it, and check that the workers hold the same weights.",
)
@click.option("--timeout", type=SECONDS, default=5.0, show_default=True, help="Seconds per worker.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(addresses: tuple[str, ...], model: Path | None, timeout: float, as_json: bool) -> None:
    """Check this machine, its plugins and its connections.

    ADDRESS is a worker, mesh://HOST:PORT; left out, all workers that were joined are checked. Exits with 1 if a check
    fails.
    """
    from mesh_core.cli.check_machine import check_machine, usable_plugins

    plugins = usable_plugins()
    settings = _settings(timeout)
    found: list[Finding] = []
    shown = ""
    checks = chain(
        check_machine(plugins), _check_model(model, plugins), _check_workers(addresses, model, plugins, settings)
    )
    for check in checks:
        found.append(check)
        if not as_json:
            shown = _show(check, shown)
    failures = sum(check.status == "FAIL" for check in found)
    if as_json:
        say_json({"failed": failures, "checks": [asdict(check) for check in found]})
    else:
        warnings = sum(check.status == "warn" for check in found)
        total = f"{len(found)} checks: {failures} failed, {warnings} warnings"
        say()
        say(Coloured(total, "red" if failures else None))
    if failures:
        click.get_current_context().exit(1)


def _settings(timeout: float) -> Settings:
    from mesh_core.errors import ConfigError
    from mesh_core.system.config import Settings

    try:
        settings = Settings.load()
    except ConfigError:
        settings = Settings()
    return replace(settings, deadlines=replace(settings.deadlines, connect=timeout))


def _check_model(model: Path | None, plugins: Plugins) -> Iterator[Finding]:
    if model is None:
        return
    from mesh_core.cli.check_files import check_files
    from mesh_core.cli.check_machine import MACHINE
    from mesh_core.cli.findings import guarded
    from mesh_core.cli.progress import LoadingLine

    yield from guarded(MACHINE, "weights", lambda: check_files(MACHINE, model, plugins, LoadingLine()))


def _check_workers(
    addresses: tuple[str, ...], model: Path | None, plugins: Plugins, settings: Settings
) -> Iterator[Finding]:
    from mesh_core.cli.check_worker import check_worker
    from mesh_core.errors import ConfigError
    from mesh_core.transport.keys import KeyStore

    if not addresses:
        try:
            addresses = tuple(f"mesh://{worker.address}" for worker in KeyStore().workers())
        except ConfigError:
            # The check of the keys has said so.
            return
    for address in addresses:
        yield from check_worker(address, model, plugins, settings)


def _show(check: Finding, subject: str) -> str:
    """Print one check, under its subject; returns the subject."""
    if check.subject != subject:
        if subject:
            say()
        say(check.subject)
    say("  ", Coloured(f"{check.status:<4}", _COLOURS[check.status]), f"  {check.name:<12} {check.detail}")
    if check.hint:
        say(f"        try: {check.hint}")
    return check.subject
