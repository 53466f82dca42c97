"""What a message may hold at most: the one place where it is decided. Knows no message."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["GREETING", "HANDED_OVER", "LIMITS", "PROBE_BYTES", "REQUEST", "SENT_BACK", "MessageLimits"]


@dataclass(frozen=True)
class MessageLimits:
    """Upper bounds, checked before anything of that size is allocated.

    Attributes:
        header: bytes of frame 0.
        depth: nesting of maps and lists in frame 0; its own map counts as one.
        text: bytes of one text (in UTF-8) or one byte string in frame 0.
        items: entries of one map or list in frame 0.
        values: all that is in frame 0: maps, lists, keys and what they hold.
        buffers: frames after frame 0.
        buffer: bytes of one of them.
        message: bytes of all frames together.
    """

    header: int = 1 << 20
    depth: int = 8
    text: int = 64 << 10
    items: int = 4096
    values: int = 128 << 10
    buffers: int = 256
    buffer: int = 4 << 30
    message: int = 8 << 30


LIMITS = MessageLimits()
"""Of any message. Only a worker's lists of what it has come near it."""

REQUEST = replace(LIMITS, values=16 << 10)
"""Of what a member sends to a worker, which one thread reads for all hosts: some milliseconds of its time."""

HANDED_OVER = replace(LIMITS, header=128 << 10, items=1024, values=4096)
"""Of what a neighbour sends: states, whose headers have a few KiB."""

GREETING = MessageLimits(header=16 << 10, text=1024, items=256, values=1024, buffers=0, buffer=0, message=16 << 10)
"""Of what the holder of an invite sends, who only enrols."""

SENT_BACK = replace(LIMITS, header=128 << 10, items=32, values=64, buffers=1, buffer=0, message=128 << 10)
"""Of what the next worker of a chain sends back: a failure with three texts; or that a probe came, or that it lives."""

PROBE_BYTES = 64 << 20
"""Largest buffer that a ``probe`` may carry or ask for."""
