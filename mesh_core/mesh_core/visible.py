"""Text from other machines and from files, as people may be shown it. Imports nothing of the mesh.

Such text may hold anything: sequences that move a terminal's cursor or rename its window, characters that turn the
order of others around or take no room, line breaks that imitate a line of ours. Here all of that becomes visible.
Whatever shows text passes it through here at that moment; names are kept and compared as they came.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

__all__ = ["LONGEST", "visible", "visible_lines", "visible_values"]

LONGEST = 4000
"""Characters of a text that are shown unless somebody says otherwise."""


def visible(text: object, most: int = LONGEST) -> str:
    """``text`` as one line of at most ``most`` characters.

    Line breaks and tabs become spaces. Other characters that a terminal acts on or does not show (control and format
    characters, surrogates, what has no meaning) are written as Python writes them, for example ``\\x1b``.
    """
    return _cut(_escaped(str(text)[: most + 1].replace("\n", " ").replace("\t", " ")), most)


def visible_lines(text: object, most: int = LONGEST) -> str:
    """As `visible`, but line breaks and tabs stay, for tracebacks and messages that may have several lines."""
    lines = str(text)[: most + 1].replace("\r\n", "\n").split("\n")
    return _cut("\n".join("\t".join(_escaped(cell) for cell in line.split("\t")) for line in lines), most)


def visible_values(value: Any) -> Any:
    """Plain values as JSON takes them, with each text in them as `visible` makes it; keys are ours and stay."""
    if isinstance(value, Mapping):
        return {key: visible_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [visible_values(item) for item in value]
    return visible(value) if type(value) is str else value


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if _is_shown(c) else c.encode("unicode_escape").decode() for c in text)


def _is_shown(character: str) -> bool:
    # Spaces of other widths, as in Japanese file names, count as not printable.
    return character.isprintable() or unicodedata.category(character) == "Zs"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
