"""Checks plain values against type annotations. Knows which annotations are understood, not which messages exist."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from mesh_core.errors import WireMalformed, WireTooLarge
from mesh_core.wire.limits import Limits

Check = Callable[[Any, str], None]
"""Raises for a value that does not fit; the text says where it stands."""


class Range:
    """``Annotated[int, Range(0, 9)]``: both bounds are allowed values."""

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most

    def __call__(self, value: int, where: str) -> None:
        if not self.least <= value <= self.most:
            raise WireMalformed(f"{where} is {value}, outside {self.least} to {self.most}.")


class Size:
    """``Annotated[int, Size(1024)]``: a number of bytes that somebody asks for."""

    def __init__(self, most: int) -> None:
        self.most = most

    def __call__(self, value: int, where: str) -> None:
        if value < 0:
            raise WireMalformed(f"{where} is {value}, a size is not negative.")
        if value > self.most:
            raise WireTooLarge(f"{where} asks for {value} bytes, the limit is {self.most}.")


class Length:
    """``Annotated[bytes, Length(16, 16)]``: bounds of a text's or a byte string's length."""

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most

    def __call__(self, value: str | bytes, where: str) -> None:
        if not self.least <= len(value) <= self.most:
            raise WireMalformed(f"{where} has length {len(value)}, outside {self.least} to {self.most}.")


class Count:
    """``Annotated[list[int], Count(2, 2)]``: bounds of a list's length."""

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most

    def __call__(self, value: list[Any], where: str) -> None:
        if not self.least <= len(value) <= self.most:
            raise WireMalformed(f"{where} has {len(value)} entries, outside {self.least} to {self.most}.")


class Keys:
    """``Annotated[dict[str, Any], Keys(name=str)]``: exactly these keys, with values of these types."""

    def __init__(self, **types: Any) -> None:
        self.types = types

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.types)

    def __call__(self, value: dict[str, Any], where: str) -> None:
        check_keys(value, self.types.keys(), where)
        for key, hint in self.types.items():
            checker(hint)(value[key], f"{where}.{key}")


def check_keys(given: Mapping[str, Any], wanted: Any, where: str) -> None:
    """Refuse a missing or an unknown key of a map, by name."""
    if given.keys() != wanted:
        missing, unknown = sorted(wanted - given.keys()), sorted(given.keys() - wanted)
        what = f"lacks {missing[0]!r}" if missing else f"has the unknown field {unknown[0][:64]!r}"
        raise WireMalformed(f"{where} {what}.")


def fields_of(message: type[Any]) -> dict[str, Check]:
    """A check for each field of a message class."""
    return {name: checker(hint) for name, hint in get_type_hints(message, include_extras=True).items()}


def checker(hint: Any) -> Check:
    """The check for an annotation: int, float, str, bytes, list, dict, one of them or None, Annotated with a class of
    this module."""
    if hint is Any:
        return _anything
    if hint in (int, float, str, bytes):
        return _exactly(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _both(checker(arguments[0]), arguments[1:])
    if origin in (Union, types.UnionType):
        (inner,) = (a for a in arguments if a is not type(None))
        return _optional(checker(inner))
    if origin is list:
        return _each(list, _all(checker(arguments[0])))
    if origin is dict:
        return _each(dict, _all(checker(arguments[1])))
    raise TypeError(f"{hint} is not an annotation of the wire format")


def _anything(value: Any, where: str) -> None:
    """What any plain value may be was checked by `check_plain`."""


def _exactly(kind: type) -> Check:
    def check(value: Any, where: str) -> None:
        if type(value) is not kind:
            raise WireMalformed(f"{where} is {type(value).__name__}, expected {kind.__name__}.")

    return check


def _both(first: Check, others: tuple[Any, ...]) -> Check:
    def check(value: Any, where: str) -> None:
        first(value, where)
        for other in others:
            other(value, where)

    return check


def _optional(inner: Check) -> Check:
    def check(value: Any, where: str) -> None:
        if value is not None:
            inner(value, where)

    return check


def _all(inner: Check) -> Check | None:
    return None if inner is _anything else inner


def _each(kind: type, inner: Check | None) -> Check:
    accepted = (list, tuple) if kind is list else (dict,)

    def check(value: Any, where: str) -> None:
        if type(value) not in accepted:
            raise WireMalformed(f"{where} is {type(value).__name__}, expected {kind.__name__}.")
        if inner is not None:
            for item in value.values() if kind is dict else value:
                inner(item, where)

    return check


def check_plain(value: Any, limits: Limits, depth: int = 1) -> None:
    """Refuse what frame 0 may not hold, at any depth.

    Raises:
        WireMalformed: a type that is not plain, a key that is no text, a float that is not finite, an integer of
            more than 64 bits, nesting over the limit.
        WireTooLarge: a text, byte string, list or map over its limit.
    """
    kind = type(value)
    if kind is str or kind is bytes:
        # A character takes at most 4 bytes: encoding is only needed near the limit.
        if len(value) * 4 > limits.text and len(value if kind is bytes else _utf8(value)) > limits.text:
            raise WireTooLarge(f"A text of {len(value)} is over the limit of {limits.text} bytes.")
    elif kind is dict or kind is list or kind is tuple:
        if depth > limits.depth:
            raise WireMalformed(f"Maps and lists are nested deeper than {limits.depth}.")
        if len(value) > limits.items:
            raise WireTooLarge(f"A map or list of {len(value)} entries is over the limit of {limits.items}.")
        if kind is dict:
            for key in value:
                if type(key) is not str:
                    raise WireMalformed(f"A key is {type(key).__name__}, expected str.")
                check_plain(key, limits, depth)
            value = value.values()
        for item in value:
            check_plain(item, limits, depth + 1)
    elif kind is float:
        if not isfinite(value):
            raise WireMalformed(f"A number is {value}; numbers are finite.")
    elif kind is int:
        if not -(1 << 63) <= value < 1 << 64:
            raise WireMalformed("An integer needs more than 64 bits.")
    elif value is not None and kind is not bool:
        raise WireMalformed(f"A value of type {kind.__name__} is not plain.")


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise WireMalformed("A text holds half a surrogate pair.") from error
