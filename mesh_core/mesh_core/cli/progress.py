"""How loading looks on a terminal: one line that is written over, or a line per phase where there is no terminal."""

from __future__ import annotations

import sys

import click


class LoadingLine:
    """A `mesh_core.host.session.Report` for people; writes to standard error."""

    def __init__(self) -> None:
        self._shown = ""
        self._terminal = sys.stderr.isatty()

    def __call__(self, worker: str, what: str, done: int, total: int) -> None:
        share = f" {100 * done // total} %" if total else ""
        if self._terminal:
            text = f"{worker}: {what}{share}"
            click.echo(f"\r{text:<{len(self._shown)}}", nl=done >= total, err=True)
            self._shown = "" if done >= total else text
        elif (phase := f"{worker}: {what}") != self._shown:
            self._shown = phase
            click.echo(phase, err=True)
