"""How loading looks on a terminal: one line that is written over, or a line per phase where there is no terminal."""

from __future__ import annotations

import sys

from mesh_core.host.progress import Activity
from mesh_core.system.terminal import say, say_over


class LoadingLine:
    """A `mesh_core.host.progress.ProgressReport` for people; writes to standard error."""

    def __init__(self) -> None:
        self._shown, self._length = "", 0
        self._terminal = sys.stderr.isatty()

    def __call__(self, activity: Activity) -> None:
        done, total, words = activity.done, activity.total, activity.words
        share = f" {100 * done // total} %" if total else ""
        if self._terminal:
            self._length = say_over(f"{words}{share}", before=self._length, end=done >= total)
        elif words != self._shown:
            self._shown = words
            say(words, err=True)
