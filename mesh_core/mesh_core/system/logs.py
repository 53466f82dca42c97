"""The mesh's loggers, and where the command line's records go.

Records name other machines and repeat what they say. They become visible text, see `mesh_core.visible`, before any
handler has them: who shows them (ComfyUI, a script, a service) need not know of it.
"""

from __future__ import annotations

import logging

from mesh_core.system.terminal import say_lines
from mesh_core.visible import visible_lines

_LONGEST = 20_000
"""Characters of a record, which may hold a traceback."""


def logger(name: str) -> logging.Logger:
    """The logger of a module, whose records hold nothing that a terminal acts on."""
    log = logging.getLogger(name)
    log.addFilter(_make_visible)
    return log


def start_logging(level: int = logging.WARNING) -> None:
    """Have all records from ``level`` on, of the mesh and of what it uses, written to standard error."""
    root = logging.getLogger()
    root.setLevel(level)
    if not root.handlers:
        root.addHandler(_ToTerminal())


class _ToTerminal(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            say_lines(_indented(self.format(record)), err=True)
        except Exception:
            self.handleError(record)


def _make_visible(record: logging.LogRecord) -> bool:
    record.msg, record.args = _indented(record.getMessage()), None
    if record.exc_info and not record.exc_text:
        record.exc_text = _indented(logging.Formatter().formatException(record.exc_info))
    return True


def _indented(text: str) -> str:
    """Further lines of a record are set in, so that none looks like a record of its own."""
    first, *more = visible_lines(text, _LONGEST).split("\n")
    return "\n".join([first, *(line if line[:1] in ("", " ") else f"  {line}" for line in more)])
