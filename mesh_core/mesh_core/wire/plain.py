"""Values of open maps, of which the format says only that they are plain. Knows no message."""

from __future__ import annotations

import re
from collections.abc import Collection
from math import isfinite
from typing import Any

from mesh_core.errors import WireMalformed
from mesh_core.wire.limits import MessageLimits

_SCALARS = frozenset({str, bytes, int, bool, float, type(None)})
_NOT_FINITE = re.compile(rb"\xcb[\x7f\xff][\xf0-\xff]")
"""How a float of 64 bits that is not finite begins in msgpack; a text or a byte string may hold the same bytes."""


def check_plain(values: Collection[Any], written: bytes, limits: MessageLimits) -> None:
    """Refuse what the decoder reads and the format does not have.

    Args:
        values: of the header's own map.
        written: the header that they were read from; its floats have 64 bits.

    Raises:
        WireMalformed: nesting over the limit, a key that is no text, a float that is not finite, an extension type.
    """
    check_kinds(values, limits)
    if _NOT_FINITE.search(written):
        _check_finite(values)


def check_kinds(values: Collection[Any], limits: MessageLimits) -> None:
    """Refuse nesting over the limit, a key that is no text, and a value of a type that is not plain.

    Raises:
        WireMalformed: one of them is in ``values``, which are those of the header's own map.
    """
    _check_kinds(values, 2, limits.depth)


def _check_kinds(values: Collection[Any], depth: int, deepest: int) -> None:
    """``depth``: that of a map or list among ``values``."""
    for value in values:
        kind = type(value)
        if kind in _SCALARS:
            continue
        if depth > deepest:
            raise WireMalformed(f"Maps and lists are nested deeper than {deepest}.")
        if kind is list or kind is tuple:
            _check_kinds(value, depth + 1, deepest)
        elif kind is dict:
            for key in value:
                if type(key) is not str:
                    raise WireMalformed(f"A key is {type(key).__name__}, expected str.")
            _check_kinds(value.values(), depth + 1, deepest)
        else:
            raise WireMalformed(f"A value of type {kind.__name__} is not plain.")


def _check_finite(values: Collection[Any]) -> None:
    for value in values:
        if type(value) is float and not isfinite(value):
            raise WireMalformed(f"A number is {value}; numbers are finite.")
        if type(value) is dict or type(value) is list:
            _check_finite(value.values() if type(value) is dict else value)
