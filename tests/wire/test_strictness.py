"""What msgspec would let through, or turn into something else without a word: refused at both ends."""

from __future__ import annotations

import dataclasses
import decimal
import enum
import tracemalloc
import uuid
from datetime import datetime, timezone
from typing import Any

import msgpack
import msgspec
import pytest

from mesh_core import wire
from mesh_core.errors import WireMalformed, WireTooLarge

from .golden import EXAMPLES, golden

NAN, INFINITE = float("nan"), float("inf")
ENTRY = {"n": "a", "c": "raw", "s": {}, "h": {}, "k": 0}
CHOICE = {"codec": "raw", "settings": {}}
NEXT = {"address": "", "server_key": "", "session": bytes(16)}
USE = {"id": "", "outline": "", "name": "ink", "strength": 1.0, "base": 1.0}


class Colour(enum.Enum):
    RED = "red"


class Text(str):
    """A text of another class."""


@dataclasses.dataclass
class Point:
    x: int = 1


def altered(kind: str, **changes: Any) -> bytes:
    return bytes(msgpack.packb({**msgpack.unpackb(golden(kind)), **changes}))


def opened(value: bytes) -> bytes:
    """An ``opened`` message whose info is ``value``, already packed."""
    head, found, tail = golden("opened").partition(msgpack.packb({"seconds": 1.5}))
    assert found
    return head + value + tail


READ: dict[str, bytes] = {
    "truth value for a number": altered("step", attempt=True),
    "truth value for a float": altered("adjust", loras=[{**USE, "strength": True}]),
    "int for a float": altered("adjust", loras=[{**USE, "strength": 1}]),
    "float for a count": altered("constants", tensors=[{**ENTRY, "hash": "x", "k": 0.0}], b=[]),
    "bytes for a text": altered("enrolled", name=b"blue"),
    "number for a text": altered("step", constants={"ids": 1}),
    "None for a text": altered("enrolled", name=None),
    "list for a map": altered("opened", info=[]),
    "not a number, in a list": altered("opened", info={"x": [0.0, {"y": NAN}]}),
    "not a number, in four bytes": opened(b"\x81\xa1x\xca\x7f\xc0\x00\x00"),
    "not a number, in a field": altered("adjust", loras=[{**USE, "base": NAN}]),
    "infinite, in a map": altered("opened", info={"x": {"y": -INFINITE}}),
    "a key twice in an open map": opened(b"\x82\xa1a\x01\xa1a\x01"),
    "a key twice, deep": opened(b"\x81\xa1x\x91\x82\xa1a\x01\xa1a\x02"),
    "a key twice in an entry": altered("constants", tensors=[{**ENTRY, "hash": "x"}], b=[]).replace(
        b"\x86\xa1n\xa1a", b"\x87\xa1n\xa1b\xa1n\xa1a"
    ),
    "a field twice": b"\x87" + golden("cancel")[1:] + b"\xa4step\x03",
    "a version twice": b"\x85" + golden("pong")[1:] + b"\xa1v\x02",
    "an unknown key in an entry": altered("result", tensors=[{**ENTRY, "x": 1}], b=[]),
    "an unknown key in a choice": altered("open", inputs={"hidden": {**CHOICE, "x": 1}}),
    "an unknown key in a LoRA": altered("adjust", loras=[{**USE, "x": 1}]),
    "an unknown key in next": altered("open", next={**NEXT, "x": 1}),
    "a missing key in an entry": altered("result", tensors=[{"n": "a"}], b=[]),
    "a number as key, deep": altered("opened", info={"x": [{1: 2}]}),
    "bytes as key, deep": altered("opened", info={"x": {b"a": 2}}),
    "a list as key": opened(b"\x81\x91\x01\x01"),
    "a map as key": opened(b"\x81\x80\x01"),
    "None as key": opened(b"\x81\xc0\x01"),
    "an extension, deep": altered("opened", info={"x": [msgpack.ExtType(5, b"x")]}),
    "an extension instead of a field": altered("enrolled", name=msgpack.ExtType(1, b"x")),
    "a timestamp of 4 bytes": opened(b"\x81\xa1x\xd6\xff\x00\x00\x00\x01"),
    "a timestamp of 8 bytes": opened(b"\x81\xa1x\xd7\xff" + bytes(8)),
    "a timestamp of 12 bytes": opened(b"\x81\xa1x\xc7\x0c\xff" + bytes(12)),
    "half a surrogate": opened(b"\x81\xa1x\xa3\xed\xa0\x80"),
    "half a surrogate in a key": opened(b"\x81\xa3\xed\xa0\x80\x01"),
    "lists inside each other": opened(b"\x81\xa1x" + b"\x91" * 500 + b"\x90"),
    "nine levels": altered("opened", info={"a": {"b": {"c": {"d": {"e": {"f": {"g": {}}}}}}}}),
    "nine levels in an entry": altered("result", tensors=[{**ENTRY, "h": {"x": [[[[[]]]]]}}], b=[]),
    "lists in an unknown key": altered("result", tensors=[{**ENTRY, "x": [[[[[[[]]]]]]]}], b=[]),
    "an unknown field that is deep": altered("pong", x=[[[[[[[[[[]]]]]]]]]]),
    "a negative size": altered("probed", b=[-1]),
}


@pytest.mark.parametrize("case", READ)
def test_a_message_that_is_almost_right_is_malformed(case: str) -> None:
    frames = [READ[case], bytes(16)] if b"probed" in READ[case] else [READ[case]]
    with pytest.raises(WireMalformed) as caught:
        wire.unpack(frames)
    assert len(str(caught.value)) < 500


def test_a_long_unknown_name_is_not_repeated_at_length() -> None:
    with pytest.raises(WireMalformed) as caught:
        wire.unpack([altered("pong", **{"x" * 60_000: 1})])
    assert len(str(caught.value)) < 500


UNSENDABLE: dict[str, Any] = {
    "set": {1},
    "date": datetime.now(),
    "date of a zone": datetime.now(timezone.utc),
    "decimal": decimal.Decimal(1),
    "UUID": uuid.UUID(int=1),
    "enumeration": Colour.RED,
    "dataclass": Point(),
    "struct": wire.Pong(1),
    "text of another class": Text("x"),
    "extension": msgspec.msgpack.Ext(1, b"x"),
    "packed already": msgspec.Raw(b"\x01"),
    "two values, packed already": msgspec.Raw(b"\x01\x02"),
    "infinite": -INFINITE,
    "deep key": [{1: 2}],
    "key of bytes": {b"a": 1},
}


@pytest.mark.parametrize("case", UNSENDABLE)
def test_a_value_that_is_not_plain_is_not_sent(case: str) -> None:
    with pytest.raises(WireMalformed):
        wire.pack(wire.Opened(1, {"x": UNSENDABLE[case]}))


@pytest.mark.parametrize(
    "message",
    [
        wire.Adjust(1, bytes(16), [{**USE, "strength": 1}]),
        wire.Adjust(1, bytes(16), [{**USE, "x": 1}]),
        wire.Result(1, bytes(16), 1, 1, [{"n": "a"}], []),
        wire.Cancel(1, bytes(16), True),
        wire.Cancel(1, bytes(16), 1 << 63),
        wire.Enrolled(1, b"blue"),  # type: ignore[arg-type]
    ],
)
def test_a_field_that_the_other_end_would_refuse_is_not_sent(message: wire.Message) -> None:
    with pytest.raises(WireMalformed):
        wire.pack(message)


@pytest.mark.parametrize("info", [{"x": ["a" * 40_000, "ä" * 40_000]}, {"x": [0] * 4097}, {"k" * 70_000: 1}])
def test_what_is_over_a_limit_is_too_large_at_both_ends(info: dict[str, Any]) -> None:
    with pytest.raises(WireTooLarge):
        wire.pack(wire.Opened(1, info))
    with pytest.raises(WireTooLarge):
        wire.unpack([altered("opened", info=info)])


def test_a_large_header_within_the_limits_arrives() -> None:
    message = wire.Opened(1, {"x": ["ä" * 30_000, [0.5] * 4096], "k" * 60_000: b"x" * 60_000})
    assert wire.unpack(wire.pack(message))[0] == message


@pytest.mark.parametrize("kind", EXAMPLES)
def test_another_implementation_writes_the_same_bytes(kind: str) -> None:
    message, buffers = EXAMPLES[kind]
    fields = msgspec.structs.asdict(message)
    header = {"v": wire.VERSION, "t": kind, **fields, "b": [len(b) for b in buffers]}
    assert msgpack.packb(header) == wire.pack(message, buffers)[0]


def test_sizes_declared_inside_a_message_allocate_nothing() -> None:
    bombs = [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdc\xff\xff" * 1000, b"\xc6\xff\xff\xff\xff"]
    places = [b"\x81\xa1v", b"\x81\xa1t", b"\x81\xa1b", b"\x82\xa1v\x02\xa1b", golden("opened")[:-15]]
    tracemalloc.start()
    try:
        for frame in [place + bomb for place in places for bomb in bombs] + [opened(bomb) for bomb in bombs]:
            with pytest.raises((WireMalformed, WireTooLarge)):
                wire.unpack([frame])
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
