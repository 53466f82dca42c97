"""How loading looks on a terminal: one line that is written over, or a line per phase where there is no terminal."""

from __future__ import annotations

import sys

import click

from mesh_core.host.progress import Activity


class LoadingLine:
    """A `mesh_core.host.progress.ProgressReport` for people; writes to standard error."""

    def __init__(self) -> None:
        self._shown = ""
        self._terminal = sys.stderr.isatty()

    def __call__(self, activity: Activity) -> None:
        done, total, words = activity.done, activity.total, activity.words
        share = f" {100 * done // total} %" if total else ""
        if self._terminal:
            text = f"{words}{share}"
            click.echo(f"\r{text:<{len(self._shown)}}", nl=done >= total, err=True)
            self._shown = "" if done >= total else text
        elif words != self._shown:
            self._shown = words
            click.echo(words, err=True)
