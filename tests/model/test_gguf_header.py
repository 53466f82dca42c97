"""GGUF files: what their headers say, as the library writes them, and that no lie in one is believed."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh_core.errors import CheckpointCorrupt, CheckpointError, CheckpointUnrecognised
from mesh_core.model.checkpoint import read_header
from mesh_core.model.folders import find_checkpoints
from mesh_core.model.gguf import _PLAIN, QUANTISED, read_gguf_header

U8, I8, U16, I32, U32, F32, BOOL, TEXT, LIST, U64 = 0, 1, 2, 5, 4, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str, type: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", type) + value


def listed(type: int, count: int, content: bytes) -> bytes:
    return struct.pack("<IQ", type, count) + content


def tensor(name: str | bytes, dims: tuple[int, ...] = (8,), type: int = 0, offset: int = 0, count: int = -1) -> bytes:
    """``dims`` as they lie in a file, columns first."""
    many = len(dims) if count < 0 else count
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", many, *dims, type, offset)


def made(
    tensors: list[bytes],
    entries: list[bytes] = (),  # type: ignore[assignment]
    data: int = 32,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    head = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(entries))))
    head += b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + bytes(data)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_the_sizes_of_blocks_are_those_of_the_library() -> None:
    ours = {t.number: (t.name, t.block_size, t.block_bytes) for t in [*_PLAIN.values(), *QUANTISED.values()]}
    theirs = {int(k): (k.name, *v) for k, v in gguf.GGML_QUANT_SIZES.items()}
    assert ours == theirs


def test_a_file_of_the_library(file: Path) -> None:
    writer = gguf.GGUFWriter(file, "flux")
    writer.add_string("general.name", "Größe 1")
    writer.add_uint32("general.quantization_version", 2)
    writer.add_float32("x.eps", 1e-6)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", ""] * 50)
    writer.add_array("comfy.gguf.orig_shape.reshaped", [4, 4, 16])
    plain = np.arange(12, dtype=np.float32).reshape(3, 4)
    packed = gguf.quants.quantize(np.ones((5, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("plain", plain)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("half", np.ones(3, np.float16))
    writer.add_tensor("bf", np.ones((2, 2), np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16, raw_shape=(2, 2))
    writer.add_tensor("reshaped", np.ones((1, 256), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(file)
    assert {n: (t.dtype, t.shape, t.nbytes) for n, t in header.tensors.items()} == {
        "plain": ("F32", (3, 4), 48),
        "packed": ("GGUF:Q8_0", (5, 64), 340),
        "half": ("F16", (3,), 6),
        "bf": ("BF16", (2, 1), 4),
        "reshaped": ("F16", (4, 4, 16), 512),
    }
    assert header.metadata == {
        "general.architecture": "flux",
        "general.name": "Größe 1",
        "general.quantization_version": "2",
    }
    assert header.content(header.tensors["plain"]) == plain.tobytes()
    assert header.content(header.tensors["packed"]) == packed.tobytes()


@pytest.mark.parametrize("version", [2, 3])
def test_padding_behind_the_last_tensor_may_be_there_or_not(version: int, file: Path) -> None:
    two = [tensor("a", (3,)), tensor("b", (5, 2), offset=32)]
    for data in (72, 96):
        file.write_bytes(made(two, data=data, version=version))
        found = read_gguf_header(file).tensors
        assert {n: (t.shape, t.nbytes) for n, t in found.items()} == {"a": ((3,), 12), "b": ((2, 5), 40)}
        assert found["b"].offset - found["a"].offset == 32


def test_another_alignment(file: Path) -> None:
    entries = [entry("general.alignment", U32, struct.pack("<I", 256))]
    file.write_bytes(made([tensor("a"), tensor("b", offset=256)], entries, 512, alignment=256))
    assert [t.offset for t in read_gguf_header(file).tensors.values()] == [256, 512]


def test_values_that_nobody_needs_are_passed_over(file: Path) -> None:
    nested = listed(LIST, 2, listed(U8, 3, b"abc") + listed(TEXT, 1, text("x")))
    entries = [
        entry("a", LIST, nested),
        entry("b", LIST, listed(F32, 100_000, bytes(400_000))),
        entry("c", BOOL, b"\1"),
        entry("d", I8, b"\xff"),
        entry("e", LIST, listed(TEXT, 0, b"")),
    ]
    file.write_bytes(made([tensor("t")], entries))
    header = read_gguf_header(file)
    assert header.metadata == {"d": "-1"} and header.tensors["t"].shape == (8,)


def test_types_of_tomorrow_are_named_by_number_and_known_ones_that_nothing_reads_by_name(file: Path) -> None:
    file.write_bytes(made([tensor("a", (256,), 19), tensor("b", (8,), 99, 64), tensor("c", offset=128)], data=160))
    found = {n: (t.dtype, t.nbytes) for n, t in read_gguf_header(file).tensors.items()}
    assert found == {"a": ("GGUF:IQ1_S", 50), "b": ("GGUF:99", 64), "c": ("F32", 32)}


HUGE = (1 << 64) - 1

LIES: dict[str, tuple[bytes, str]] = {
    "version 1": (made([tensor("a")], version=1), "version 1; versions 2 and 3"),
    "big endian": (made([tensor("a")], version=3 << 24), "byte order"),
    "of a version to come": (made([tensor("a")], version=4), "version 4"),
    "many tensors": (made([tensor("a")], counts=(HUGE, 0)), "more names"),
    "one tensor more": (made([tensor("a")], counts=(2, 0)), "overlaps its neighbour"),
    "99,999 tensors": (made([tensor("a")], counts=(99_999, 0)), "beyond its end|dimensions"),
    "many entries": (made([tensor("a")], counts=(1, HUGE)), "more names"),
    "a name without end": (made([struct.pack("<Q", HUGE)]), "text of"),
    "a name beyond the file": (made([struct.pack("<Q", 4000)]), "beyond its end"),
    "a key without end": (made([], [struct.pack("<Q", 1 << 60)]), "text of"),
    "a text without end": (made([], [text("k") + struct.pack("<IQ", TEXT, 1 << 40)]), "text of"),
    "a text beyond the file": (made([], [text("k") + struct.pack("<IQ", TEXT, 1 << 20)]), "beyond its end"),
    "a name that is no text": (made([tensor(b"\xff\xfe")]), "UTF-8"),
    "an unknown type of value": (made([], [entry("k", 13, bytes(8))]), "unknown type 13"),
    "a list of an unknown type": (made([], [entry("k", LIST, listed(77, 1, bytes(8)))]), "unknown type 77"),
    "a list without end": (made([], [entry("k", LIST, listed(U8, HUGE, b""))]), "beyond its end"),
    "texts without end": (made([], [entry("k", LIST, listed(TEXT, HUGE, b""))]), "longer or deeper"),
    "a million texts": (made([], [entry("k", LIST, listed(TEXT, 1_000_000, b""))]), "beyond its end"),
    "lists of lists": (made([], [entry("k", LIST, struct.pack("<IQ", LIST, 1) * 1000)]), "longer or deeper"),
    "an entry twice": (made([tensor("a")], [entry("k", U8, b"1")] * 2), "two entries 'k'"),
    "a tensor twice": (made([tensor("a"), tensor("a", offset=32)], data=64), "twice"),
    "five dimensions": (made([tensor("a", (1, 1, 1, 1, 8))]), "5 dimensions"),
    "dimensions without end": (made([tensor("a", count=1 << 31)]), "2147483648 dimensions"),
    "a shape without end": (made([tensor("a", (HUGE,) * 4)]), "truncated"),
    "an offset without end": (made([tensor("a", offset=HUGE)]), "leaves a gap"),
    "an offset at a gap": (made([tensor("a"), tensor("b", offset=96)], data=128), "leaves a gap"),
    "an overlap": (made([tensor("a", (16,)), tensor("b", offset=32)], data=64), "overlaps"),
    "twice the same bytes": (made([tensor("a"), tensor("b")]), "overlaps"),
    "an offset not aligned": (made([tensor("a"), tensor("b", offset=33)], data=96), "overlaps"),
    "a gap at the start": (made([tensor("a", offset=32)], data=64), "leaves a gap"),
    "an unknown type beyond the file": (made([tensor("a"), tensor("b", type=99, offset=32)], data=20), "truncated"),
    "truncated data": (made([tensor("a")], data=31), "truncated"),
    "data behind the last": (made([tensor("a")], data=33), "1 bytes more"),
    "data without tensors": (made([], data=32), "32 bytes more"),
    "half a block": (made([tensor("a", (48,), 8)]), "no whole Q8_0 blocks of 32"),
    "half a block in each row": (made([tensor("a", (128, 2), 12)], data=144), "no whole Q4_K blocks of 256"),
    "no alignment": (made([tensor("a")], [entry("general.alignment", U32, bytes(4))]), "alignment"),
    "an odd alignment": (made([tensor("a")], [entry("general.alignment", U32, b"\x30\0\0\0")]), "alignment"),
    "an alignment without end": (made([], [entry("general.alignment", U32, b"\0\0\0\x80")]), "alignment"),
    "an alignment in words": (made([], [entry("general.alignment", TEXT, text("32"))]), "alignment"),
    "one part of three": (made([], [entry("split.count", U16, b"\3\0")]), "in 3 files"),
    "another original shape": (
        made([tensor("a")], [entry("comfy.gguf.orig_shape.a", LIST, listed(I32, 1, struct.pack("<i", 9)))]),
        "original shape",
    ),
    "a negative original shape": (
        made([tensor("a")], [entry("comfy.gguf.orig_shape.a", LIST, listed(I32, 2, struct.pack("<ii", -2, -4)))]),
        "original shape",
    ),
    "an original shape in words": (made([tensor("a")], [entry("comfy.gguf.orig_shape.a", TEXT, text("8"))]), "shape"),
    "a long original shape": (
        made([tensor("a")], [entry("comfy.gguf.orig_shape.a", LIST, listed(I32, HUGE, b""))]),
        "no short list",
    ),
    "an empty file of that name": (b"GGUF", "start is damaged"),
    "a start alone": (b"GGUF\3\0\0\0" + bytes(8), "start is damaged"),
}


@pytest.mark.parametrize(("content", "says"), LIES.values(), ids=LIES)
def test_a_lie_is_an_error_that_names_the_file_and_allocates_nothing(content: bytes, says: str, file: Path) -> None:
    file.write_bytes(content)
    tracemalloc.start()
    begun = perf_counter()
    with pytest.raises(CheckpointError, match=says) as caught:
        read_header(file)
    assert perf_counter() - begun < 2
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()
    assert str(file) in str(caught.value) and type(caught.value) in (CheckpointCorrupt, CheckpointUnrecognised)


def test_a_header_over_the_limit_is_refused(file: Path) -> None:
    file.write_bytes(made([tensor("a")], [entry("k", LIST, listed(U8, 5000, bytes(5000)))]))
    assert read_gguf_header(file, 8000).tensors
    with pytest.raises(CheckpointUnrecognised, match="a header of more than"):
        read_gguf_header(file, 4000)


def small() -> bytes:
    """One of everything."""
    entries = [
        entry("general.architecture", TEXT, text("flux")),
        entry("general.alignment", U32, struct.pack("<I", 32)),
        entry("tokens", LIST, listed(TEXT, 2, text("a") + text("b"))),
        entry("comfy.gguf.orig_shape.c", LIST, listed(I32, 2, struct.pack("<ii", 2, 16))),
        entry("size", U64, struct.pack("<Q", 7)),
    ]
    tensors = [tensor("a", (3, 2)), tensor("b", (64, 2), 8, 32), tensor("c", (32,), 1, 192)]
    return made(tensors, entries, 256)


def outcome(file: Path, content: bytes) -> None:
    """Reading ends soon, in a header or in a named error."""
    file.write_bytes(content)
    begun = perf_counter()
    try:
        read_gguf_header(file)
    except CheckpointError as error:
        assert str(file) in str(error)
    assert perf_counter() - begun < 2


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the file system's clock to tick after each write."""
    monkeypatch.setattr("mesh_core.system.file_stamp._TICK_NS", 0)
    monkeypatch.setattr("mesh_core.system.file_stamp._COARSE_NS", 0)


@pytest.mark.parametrize("change", [lambda b: b ^ 0xFF, lambda b: b ^ 1, lambda b: b ^ 0x80], ids=["all", "1", "128"])
def test_no_byte_of_a_header_is_trusted(change: Callable[[int], int], settled: None, file: Path) -> None:
    intact = small()
    for place in range(len(intact) - 256):
        outcome(file, intact[:place] + bytes([change(intact[place])]) + intact[place + 1 :])


def test_a_header_may_end_anywhere(settled: None, file: Path) -> None:
    intact = small()
    assert set(read_header_of(file, intact)) == {"a", "b", "c"}
    for length in range(len(intact) - 64):
        file.write_bytes(intact[:length])
        with pytest.raises(CheckpointError):
            read_gguf_header(file)


def read_header_of(file: Path, content: bytes) -> Any:
    file.write_bytes(content)
    return read_gguf_header(file).tensors


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(damage=st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
def test_any_damage_is_a_named_error(damage: list[tuple[int, bytes]], settled: None, tmp_path: Path) -> None:
    content = bytearray(small())
    for place, new in damage:
        content[place : place + len(new)] = new
    outcome(tmp_path / "model.gguf", bytes(content))


def test_files_beside_a_model_are_found(tmp_path: Path) -> None:
    model, alone = tmp_path / "a", tmp_path / "b"
    for folder in (model, alone):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "x-Q4_K.GGUF").write_bytes(small())
    (model / "diffusion_pytorch_model.safetensors").write_bytes(bytes(8))
    assert list(find_checkpoints(tmp_path)) == [model, model / "x-Q4_K.GGUF", alone / "x-Q4_K.GGUF"]
