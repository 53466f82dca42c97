"""What several commands take as the value of an option."""

from __future__ import annotations

import math

from mesh_core.errors import ConfigError


def parse_worker(text: str) -> str | tuple[str, str]:
    """``ADDRESS`` or ``ADDRESS=SPAN``; only what follows the last ``=`` and looks like a span is one."""
    address, sign, span = text.rpartition("=")
    return (address, span) if sign and set(span) <= set("0123456789: ") and ":" in span else text


def parse_lora(text: str) -> tuple[str, float]:
    """``FILE`` or ``FILE=STRENGTH``; only what follows the last ``=`` and is a number is a strength.

    Raises:
        ConfigError: a strength without end.
    """
    source, sign, number = text.rpartition("=")
    try:
        strength = float(number) if sign else 1.0
    except ValueError:
        return text, 1.0
    if not math.isfinite(strength):
        raise ConfigError(f"The strength of a LoRA is a number; {text[:200]!r} has none.", hint=f"{source[:200]}=0.8")
    return (source, strength) if sign else (text, 1.0)
