"""The one place that writes to a terminal. Whatever is written becomes visible text first, see `mesh_core.visible`.

So no command need remember which of its words came from another machine or from a file.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import click

from mesh_core.visible import visible


class Coloured(NamedTuple):
    """A part of a line in a colour, where the terminal has colours."""

    text: str
    colour: str | None


def say(*parts: str | Coloured, err: bool = False) -> None:
    """Write one line, to standard output or to standard error."""
    _write("".join(_styled(part, err) for part in parts), err=err)


def say_lines(lines: str | Iterable[str], *, err: bool = False) -> None:
    """Write lines, or a text line by line."""
    for line in lines.split("\n") if isinstance(lines, str) else lines:
        say(line, err=err)


def say_json(value: Any) -> None:
    """Write JSON to standard output; control characters in it are escaped as JSON has it, and stay what they are."""
    _write(json.dumps(value, indent=2).replace("\x7f", "\\u007f"), err=False)


def say_over(text: str, *, before: int = 0, end: bool = False) -> int:
    """Write over the line that standard error's cursor is in.

    Args:
        before: how long what stands there is, as the last call returned it.
        end: go on to the next line.

    Returns:
        How long it is now.
    """
    # What is wider than the terminal goes on in the next line, and cannot be written over.
    shown = visible(text, max(shutil.get_terminal_size().columns - 1, 20))
    _write(f"\r{_encodable(shown, True):<{before}}", err=True, nl=end)
    return 0 if end else len(shown)


def _styled(part: str | Coloured, err: bool) -> str:
    if isinstance(part, Coloured):
        return click.style(_encodable(visible(part.text), err), fg=part.colour)
    return _encodable(visible(part), err)


def _encodable(text: str, err: bool) -> str:
    """``text`` with what the stream's encoding lacks as escapes: a name must not end the program that shows it."""
    encoding = getattr(sys.stderr if err else sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _write(text: str, *, err: bool, nl: bool = True) -> None:
    click.echo(text, nl=nl, err=err)
