"""How much is in a header, found in its bytes before anything is made of them. Knows no message."""

from __future__ import annotations

from mesh_core.errors import WireTooLarge
from mesh_core.wire.limits import MessageLimits


def check_lengths(header: bytes, limits: MessageLimits) -> None:
    """Refuse texts, byte strings, lists and maps that are over their limits, at any depth, and too many values in all.

    Looks at no more values than are allowed, so that its time does not grow with what a stranger sends. What is no
    msgpack is left to the decoder.

    Raises:
        WireTooLarge: one of them is.
    """
    if len(header) <= min(limits.items, limits.text, limits.values):  # nothing in a shorter one can be over these
        return
    at, values, end = 0, 0, len(header)
    while at < end:
        values += 1
        if values > limits.values:
            raise WireTooLarge(f"A header of more than {limits.values} values is over the limit.")
        tag = header[at]
        at += _FIXED[tag] or _announced(header, at, tag, limits)


def _announced(header: bytes, at: int, tag: int, limits: MessageLimits) -> int:
    """How many bytes belong to the value at ``at``, which says how long it is; of a list or map, those of its head."""
    after = at + 1 + _WIDTH[tag]
    length = int.from_bytes(header[at + 1 : after], "big")
    if tag >= _LISTS_AND_MAPS:
        if length > limits.items:
            raise WireTooLarge(f"A map or list of {length} entries is over the limit of {limits.items}.")
        return after - at
    if length > limits.text:
        raise WireTooLarge(f"A text of {length} bytes is over the limit of {limits.text}.")
    return after - at + length + (tag in _EXTENSIONS)


_LISTS_AND_MAPS = 0xDC
"""The first tag of a list or map that announces its length; all others are below it."""

_EXTENSIONS = range(0xC7, 0xCA)
"""Tags that announce a length and have a byte for their kind."""

_WIDTH = {first + size: 1 << size for first in (0xC4, 0xC7, 0xD9) for size in range(3)}
_WIDTH |= {0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
"""Bytes of the length that is announced after a tag."""


def _fixed(tag: int) -> int:
    """Bytes of a value that begins with ``tag``; of a list or map, those of its head; 0 where the length follows."""
    if 0xA0 <= tag <= 0xBF:  # short text
        return 1 + (tag & 0x1F)
    if tag in _WIDTH:
        return 0
    numbers = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
    extensions = {0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17}
    return 1 + numbers.get(tag, 0) + extensions.get(tag, 0)


_FIXED = tuple(map(_fixed, range(256)))
