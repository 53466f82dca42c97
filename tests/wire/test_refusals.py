"""What a message may not be: each refusal by its name, at both ends."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import msgspec
import pytest
from msgspec.structs import replace

from mesh_core import wire
from mesh_core.errors import MeshError, WireMalformed, WireTooLarge, WireUnsupportedVersion

from .golden import EXAMPLES, golden


def altered(kind: str, **changes: Any) -> bytes:
    return bytes(msgpack.packb({**msgpack.unpackb(golden(kind)), **changes}))


def without(kind: str, name: str) -> bytes:
    header = msgpack.unpackb(golden(kind))
    del header[name]
    return bytes(msgpack.packb(header))


def opened_with(info: bytes) -> bytes:
    """An ``opened`` message with an open map that no writer would write."""
    return golden("opened").replace(msgpack.packb({"seconds": 1.5}), info)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


ENTRY = {"n": "a", "c": "raw", "s": {}, "h": {}, "k": 0}

IDS = b"\xa3ids\xa6c0ffee"
LORA = {"id": "", "outline": "", "name": "ink", "strength": 1.0, "base": 1.0}

MALFORMED: dict[str, list[bytes]] = {
    "no frames": [],
    "no bytes": [b""],
    "not msgpack": [b"\xc1"],
    "cut short": [golden("step")[:-1]],
    "bytes after the end": [golden("pong") + b"\0"],
    "not a map": [msgpack.packb([1])],
    "no version": [without("pong", "v")],
    "version is no number": [altered("pong", v="1")],
    "version is a truth value": [altered("pong", v=True)],
    "unknown type": [altered("pong", t="shutdown")],
    "type is a list": [altered("pong", t=["pong"])],
    "unknown field": [altered("pong", extra=1)],
    "missing field": [without("cancel", "step")],
    "wrong type": [altered("cancel", step="3")],
    "truth value for a number": [altered("cancel", step=True)],
    "float for a number": [altered("cancel", step=3.0)],
    "negative": [altered("cancel", step=-1)],
    "session too short": [altered("cancel", session=b"123")],
    "text for bytes": [altered("cancel", session="x" * 16)],
    "span of three": [altered("open", span=[1, 2, 3])],
    "span of texts": [altered("open", span=["1", "2"])],
    "codec choice lacks settings": [altered("open", inputs={"hidden": {"codec": "raw"}})],
    "next with another key": [altered("open", next={"address": "", "server_key": "", "session": b"", "x": 1})],
    "entry is no map": [altered("step", tensors=[1], b=[])],
    "entry with a negative count": [altered("step", tensors=[{**ENTRY, "k": -1}], b=[])],
    "not a number": [altered("step", options={"guidance": float("nan")}), b"twelve bytes"],
    "infinite": [altered("opened", info={"seconds": float("inf")})],
    "too deep": [altered("opened", info={"x": nested(8)})],
    "nested beyond all": [b"\x91" * 4000 + b"\x90"],
    "maps nested beyond all": [b"\x81\xa1a" * 4000 + b"\x80"],
    "key is no text": [altered("opened", info={1: 1})],
    "key is bytes": [altered("opened", info={b"a": 1})],
    "key twice": [b"\x85" + golden("pong")[1:] + b"\xa1t\xa4pong"],
    "extension type": [altered("opened", info={"x": msgpack.ExtType(5, b"x")})],
    "timestamp": [altered("opened", info={"x": msgpack.Timestamp(1)})],
    "text is not UTF-8": [golden("enrolled").replace(b"blue", b"\xff\xfe\xfd\xfc")],
    "buffer that was not announced": [golden("pong"), b"x"],
    "announced buffer that is not there": [altered("step")],
    "lying size": [altered("step", b=[11]), b"twelve bytes"],
    "sizes are floats": [altered("step", b=[12.0]), b"twelve bytes"],
    "sizes are no list": [altered("pong", b=0)],
    "buffers that no tensor accounts for": [altered("result", b=[1] * 4), b"1", b"2", b"3", b"4"],
    "buffers on a message without": [altered("pong", b=[1]), b"1"],
    "whole number for a float": [altered("adjust", loras=[{**LORA, "strength": 1}])],
    "float of 32 bits": [golden("opened").replace(b"\xcb\x3f\xf8" + bytes(6), b"\xca\x3f\xc0\x00\x00")],
    "number wider than it needs": [golden("pong").replace(b"id\x0b", b"id\xcc\x0b")],
    "text longer written than it needs": [golden("enrolled").replace(b"\xa4blue", b"\xd9\x04blue")],
    "truth value in a list of numbers": [altered("sought", held=[True])],
    "float in a list of numbers": [altered("sought", held=[0.0])],
    "entry with an unknown key": [altered("step", tensors=[{**ENTRY, "x": 1}], b=[])],
    "entry without a key": [altered("step", tensors=[{"n": "a"}], b=[])],
    "not a number deep inside": [altered("opened", info={"x": [{"y": [float("nan")]}]})],
    "not a number in an entry": [altered("adjust", loras=[{**LORA, "base": float("nan")}])],
    "infinite in a trace": [altered("result", tensors=[], b=[], trace=[{"ms": float("-inf")}])],
    "key twice in an open map": [opened_with(b"\x82\xa1a\x01\xa1a\x01")],
    "key twice deep inside": [opened_with(b"\x81\xa1a\x91\x82\xa1b\x01\xa1b\x02")],
    "key twice and as short as without": [opened_with(b"\x83\xa1a\x01\xa1a\x01\xa1b\xca\x3f\xc0\x00\x00")],
    "key twice in a map of texts": [
        golden("step").replace(b"\x81\xa3ids\xa6c0ffee", b"\x82" + b"\xa3ids\xa6c0ffee" * 2)
    ],
    "field twice": [b"\x85" + golden("pong")[1:-3] + b"\xa2id\x0b" + golden("pong")[-3:]],
    "version twice": [b"\x85" + golden("pong")[1:-3] + b"\xa1v\x02" + golden("pong")[-3:]],
    "fields in another order": [msgpack.packb(dict(reversed(msgpack.unpackb(golden("pong")).items())))],
    "key is no text deep inside": [altered("opened", info={"x": [{1: 1}]})],
    "key is a list": [opened_with(b"\x81\x91\x01\x01")],
    "extension type for a number": [altered("cancel", step=msgpack.ExtType(5, b"x"))],
    "extension type deep inside": [altered("opened", info={"x": [msgpack.ExtType(5, b"x")]})],
    "nested beyond all in an open map": [opened_with(b"\x81\xa1a" + b"\x91" * 4000 + b"\x90")],
    "nesting bomb in a field": [altered("sought", held=nested(500))],
    "half a surrogate pair": [golden("enrolled").replace(b"\xa4blue", b"\xa4\xed\xa0\x80x")],
    "more bytes announced than there are": [opened_with(b"\x81\xa1a\xc6\xff\xff\xff\xff")],
    "more entries announced than there are": [opened_with(b"\x81\xa1a\xdd\xff\xff\xff\xff")],
    "no wire versions": [altered("hello", wire=[])],
    "negative wire version": [altered("hello", wire=[-1, 2])],
    "endless wire versions": [altered("hello", wire=[2] * 17)],
    "wire version that is no number": [altered("welcome", wire="2")],
}

TOO_LARGE: dict[str, list[bytes]] = {
    "header": [b"\0" * ((1 << 20) + 1)],
    "text": [altered("enrolled", name="x" * ((64 << 10) + 1))],
    "text of long characters": [altered("enrolled", name="\u20ac" * (22 << 10))],
    "byte string": [altered("opened", info={"x": bytes((64 << 10) + 1)})],
    "list": [altered("catalogued", checkpoints=[{}] * 4097)],
    "map": [altered("opened", info={str(i): 1 for i in range(4097)})],
    "number of buffers": [golden("result"), *[b""] * 257],
    "keys of a map of texts": [altered("step", constants={str(i): "" for i in range(4097)}, tensors=[], b=[])],
    "numbers": [altered("sought", held=[0] * 4097)],
    "key": [altered("opened", info={"x" * ((64 << 10) + 1): 1})],
    "probe": [altered("probe", size=(64 << 20) + 1)],
    "values in all": [opened_with(msgpack.packb({"x": [[None] * 4000] * 33}))],
    "maps in all": [opened_with(msgpack.packb({"x": [[{}] * 4000] * 33}))],
    "nesting bomb": [b"\x91" * (1 << 20)],
    "nulls, and no message at all": [b"\xc0" * (1 << 20)],
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_breaks_the_format_is_malformed(case: str) -> None:
    with pytest.raises(WireMalformed) as caught:
        wire.unpack(MALFORMED[case])
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("frame", "named"),
    [
        (altered("pong", extra=1), "unknown field 'extra'"),
        (without("cancel", "step"), "lacks 'step'"),
        (altered("cancel", step="3"), "step"),
        (altered("cancel", step=-1), "step"),
        (altered("cancel", session=b"123"), "session"),
        (altered("step", tensors=[{**ENTRY, "k": -1}], b=[]), "tensors.*k"),
        (altered("open", inputs={"hidden": {"codec": "raw"}}), "settings.*inputs"),
        (opened_with(b"\x82\xa1a\x01\xa1a\x01"), "occurs twice"),
        (altered("pong", **{"\x1b[2J" + "x" * 1000: 1}), r"unknown field '\\x1b"),
    ],
)
def test_a_refusal_names_what_is_wrong(frame: bytes, named: str) -> None:
    with pytest.raises(WireMalformed, match=named):
        wire.unpack([frame])


def test_a_message_is_frozen_and_equal_to_what_it_was_read_as() -> None:
    message, _ = EXAMPLES["cancel"]
    with pytest.raises(AttributeError):
        message.id = 3  # type: ignore[misc]
    assert wire.unpack([golden("cancel")])[0] == message


@pytest.mark.parametrize("case", TOO_LARGE)
def test_what_is_over_a_limit_is_too_large(case: str) -> None:
    with pytest.raises(WireTooLarge):
        wire.unpack(TOO_LARGE[case])


@pytest.mark.parametrize(("version", "where"), [(wire.VERSION + 1, "this machine"), (0, "the other machine")])
def test_another_version_names_both_and_the_end_to_update(version: int, where: str) -> None:
    with pytest.raises(WireUnsupportedVersion) as caught:
        wire.unpack([altered("hello", v=version, fields_of_tomorrow={})])
    assert f"version {version}," in str(caught.value)
    assert f"version {wire.VERSION}." in str(caught.value)
    assert where in caught.value.hint


def test_limits_on_buffers_and_messages_hold_at_both_ends() -> None:
    message, buffers = EXAMPLES["result"]
    frames = wire.pack(message, buffers)
    for limits in (wire.MessageLimits(buffer=11), wire.MessageLimits(message=100), wire.MessageLimits(buffers=2)):
        with pytest.raises(WireTooLarge):
            wire.unpack(frames, limits)
        with pytest.raises(WireTooLarge):
            wire.pack(message, buffers, limits)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1},
        {"step": "3"},
        {"session": b"short"},
        {"options": {"x": float("nan")}},
        {"options": {"x": object()}},
        {"options": {"x": 1 << 64}},
        {"options": {"x": "\ud800"}},
        {"options": {1: "x"}},
        {"options": {"x": nested(8)}},
        {"tensors": []},
        {"step": 3.0},
        {"step": True},
        {"attempt": 1 << 63},
        {"sequence": b"cond"},
        {"options": {"x": float("inf")}},
        {"options": {"x": msgspec.msgpack.Ext(5, b"x")}},
        {"trace": [{"x": {None: 1}}]},
        {"constants": {"x": 1}},
    ],
)
def test_a_sender_learns_of_its_own_mistake(changes: dict[str, Any]) -> None:
    message, buffers = EXAMPLES["step"]
    with pytest.raises(WireMalformed):
        wire.pack(replace(message, **changes), buffers)


def test_a_buffer_with_gaps_is_refused() -> None:
    message, _ = EXAMPLES["step"]
    with pytest.raises(WireMalformed, match="contiguous"):
        wire.pack(message, [memoryview(bytearray(10))[::2]])


def test_buffers_are_not_copied() -> None:
    message, _ = EXAMPLES["step"]
    memory = bytearray(12)
    _, (view,) = wire.unpack(wire.pack(message, [memoryview(memory).cast("I")]))
    memory[3] = 7
    assert view[3] == 7


def test_a_tuple_travels_as_a_list() -> None:
    message = EXAMPLES["open"][0]
    assert isinstance(message, wire.Open)
    read, _ = wire.unpack(wire.pack(replace(message, span=(4, 8))))  # type: ignore[arg-type]
    assert read == message


@pytest.mark.parametrize("value", [b"\xc0", b"\x80", b"\xcb\x7f\xf8" + bytes(6), b"\xa1a"])
def test_many_values_cost_neither_memory_nor_more_time_than_the_allowed_ones(value: bytes) -> None:
    """A mebibyte of nulls in lists that are each within the limits is still a lot to read."""
    entries = 4000
    header = opened_with(b"\x81\xa1x\xdc\x00\x40" + (b"\xdc" + entries.to_bytes(2, "big") + value * entries) * 26)
    wire.unpack([opened_with(b"\x81\xa1x\x93" + (b"\xdc\x0f\xa0" + b"\xc0" * entries) * 3)], wire.REQUEST)
    tracemalloc.start()
    try:
        with pytest.raises(WireTooLarge, match=f"{wire.REQUEST.values} values"):
            wire.unpack([header], wire.REQUEST)
        assert tracemalloc.get_traced_memory()[1] < len(header) + (64 << 10)
    finally:
        tracemalloc.stop()


def test_declared_sizes_allocate_nothing() -> None:
    bombs = [
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xdd\x00\x0f\xff\xff" * 1000,
        b"\xdc\x10\x00" * 1000,
    ]
    tracemalloc.start()
    try:
        for bomb in bombs:
            with pytest.raises(MeshError):
                wire.unpack([bomb])
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
