"""The bytes on the wire stay what they are within a wire version, and the document tells all of them."""

from __future__ import annotations

from pathlib import Path

import msgpack
import pytest
from msgspec.structs import fields

from mesh_core import wire

from .golden import EXAMPLES, FOLDER, as_msgpack, golden

DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "wire-format.md"


def test_there_is_one_golden_message_of_each_type() -> None:
    assert set(EXAMPLES) == set(wire.MESSAGES) == {path.stem for path in FOLDER.glob("*.bin")}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_packing_gives_the_golden_bytes(kind: str) -> None:
    message, buffers = EXAMPLES[kind]
    assert wire.pack(message, buffers) == [golden(kind), *buffers]


@pytest.mark.parametrize("kind", EXAMPLES)
def test_another_writer_and_reader_of_msgpack_agree(kind: str) -> None:
    message, buffers = EXAMPLES[kind]
    assert as_msgpack(message, buffers) == golden(kind)
    header = msgpack.unpackb(golden(kind))
    values = {name: getattr(message, name) for name in message.__struct_fields__}
    assert {name: header[name] for name in values} == values


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_golden_bytes_are_read_back(kind: str) -> None:
    message, buffers = EXAMPLES[kind]
    read, views = wire.unpack([golden(kind), *buffers])
    assert read == message
    assert [bytes(view) for view in views] == buffers


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_document_names_every_type_and_field(kind: str) -> None:
    sections = DOCUMENT.read_text(encoding="utf-8").split("\n#### ")
    section = next((s for s in sections if s.startswith(f"`{kind}`")), "")
    assert section, f"no section for {kind}"
    missing = [f.name for f in fields(wire.MESSAGES[kind]) if f.name != "id" and f"`{f.name}`" not in section]
    assert not missing


def test_the_document_states_the_limits_that_are_enforced() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, limit in vars(wire.LIMITS).items():
        assert f"| {name} | {limit} |" in text
    senders = {"member": wire.REQUEST, "neighbour": wire.HANDED_OVER, "holder of an invite": wire.GREETING}
    for sender, its in senders.items():
        assert f"| {sender} | {its.header} | {its.text} | {its.items} | {its.values} | {its.buffers}" in text
