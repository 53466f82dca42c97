"""Whatever arrives, `unpack` either reads it or says with a wire error why not."""

from __future__ import annotations

from typing import Any

import msgpack
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mesh_core import wire
from mesh_core.errors import WireError

from .golden import EXAMPLES, golden

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
KINDS = st.sampled_from(sorted(EXAMPLES))


def read(frames: list[bytes]) -> None:
    """Unpack; what was read must pack to a message that reads the same."""
    try:
        message, buffers = wire.unpack(frames)
    except WireError:
        return
    again, _ = wire.unpack(wire.pack(message, buffers))
    assert again == message


@given(st.lists(st.binary(max_size=300), max_size=4))
@example([b"\x80"])
@settings(max_examples=300, deadline=None)
def test_arbitrary_frames(frames: list[bytes]) -> None:
    read(frames)


@given(KINDS, st.data())
@settings(max_examples=300, deadline=None)
def test_golden_messages_with_flipped_bytes(kind: str, data: st.DataObject) -> None:
    header = bytearray(golden(kind))
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    read([bytes(header), *EXAMPLES[kind][1]])


@given(KINDS, PLAIN, st.data())
@settings(max_examples=300, deadline=None)
def test_golden_messages_with_another_value_in_a_field(kind: str, value: Any, data: st.DataObject) -> None:
    header = msgpack.unpackb(golden(kind))
    header[data.draw(st.sampled_from(sorted(header)))] = value
    read([msgpack.packb(header), *EXAMPLES[kind][1]])


@given(KINDS, st.lists(st.binary(max_size=20), max_size=4), st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_golden_headers_cut_and_with_other_buffers(kind: str, buffers: list[bytes], cut: int) -> None:
    read([golden(kind)[: len(golden(kind)) - cut], *buffers])


@given(st.dictionaries(st.text(max_size=8), PLAIN, max_size=4))
@settings(max_examples=300, deadline=None)
def test_open_maps_are_written_as_another_writer_writes_them(info: dict[str, Any]) -> None:
    """Or refused, where a float is not finite or the nesting too deep."""
    try:
        (header,) = wire.pack(wire.Opened(4, info))
    except WireError:
        return
    assert header == msgpack.packb({"v": wire.VERSION, "t": "opened", "id": 4, "info": info, "b": []})
