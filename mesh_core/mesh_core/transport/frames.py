"""Frames as transports handle them: flat views of bytes within the limits. Knows no sockets."""

from __future__ import annotations

from collections.abc import Sequence

from mesh_core.errors import WireTooLarge
from mesh_core.wire.framing import Frame, byte_view
from mesh_core.wire.limits import MessageLimits

__all__ = ["byte_views"]


def byte_views(frames: Sequence[Frame], limits: MessageLimits) -> list[memoryview]:
    """Views of bytes of ``frames``; no copy.

    Raises:
        WireTooLarge: a frame over its limit; sent, it would cost the connection.
    """
    views = [byte_view(frame) for frame in frames]
    largest = max((view.nbytes for view in views), default=0)
    if largest > limits.buffer:
        raise WireTooLarge(f"A frame of {largest} bytes is over the limit of {limits.buffer}.")
    return views
