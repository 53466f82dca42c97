"""Text as a hostile machine sends it, and what must be left of it on a screen."""

from __future__ import annotations

import unicodedata

NASTY = "\x1b]0;owned\x07\x1b[2J\r\u202e\u200b[bold]evil[/bold]\x9b31m"
"""Renames the terminal's window, clears it, goes back to the start of the line, turns what follows around."""


def assert_harmless(text: str, *, lines: bool = False) -> None:
    """Nothing in ``text`` makes a terminal do anything but print; line breaks are allowed where ``lines`` says so."""
    acting = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - set(
        "\n\t" if lines else ""
    )
    assert not acting, f"{sorted(acting)!r} in {text!r}"
    if "evil" in text:
        assert "[bold]evil[/bold]" in text, "markup is text like any other"
