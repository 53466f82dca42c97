"""What a message may hold at most: the one place where it is decided. Knows no message."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LIMITS", "PROBE_BYTES", "MessageLimits"]


@dataclass(frozen=True)
class MessageLimits:
    """Upper bounds, checked before anything of that size is allocated.

    Attributes:
        header: bytes of frame 0.
        depth: nesting of maps and lists in frame 0; its own map counts as one.
        text: bytes of one text (in UTF-8) or one byte string in frame 0.
        items: entries of one map or list in frame 0.
        buffers: frames after frame 0.
        buffer: bytes of one of them.
        message: bytes of all frames together.
    """

    header: int = 1 << 20
    depth: int = 8
    text: int = 64 << 10
    items: int = 4096
    buffers: int = 256
    buffer: int = 4 << 30
    message: int = 8 << 30


LIMITS = MessageLimits()
PROBE_BYTES = 64 << 20
"""Largest buffer that a ``probe`` may carry or ask for."""
