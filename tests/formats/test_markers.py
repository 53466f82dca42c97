"""What files say of their layers' formats: read from both places, bounded, and never beyond what is understood."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mesh_core.errors import CheckpointCorrupt, CheckpointError, CheckpointUnrecognised
from mesh_core.formats.markers import Marked, Marker, marked_layers
from mesh_core.model.checkpoint import read_header

NVFP4, FP8 = {"format": "nvfp4"}, {"format": "float8_e4m3fn"}
GROUPS = {"convrot": True, "convrot_groupsize": 64}


def read(folder: Path, note: str | None = None, markers: Mapping[str, Tensor] | None = None) -> Marked:
    """What is said in a file of two layers, ``a`` and ``b``."""
    file = folder / "model.safetensors"
    tensors = {"a.weight": torch.zeros(2, 2), "b.weight": torch.zeros(2, 2)} | dict(markers or {})
    save_file(tensors, file, None if note is None else {"_quantization_metadata": note})
    return marked_layers(read_header(file))


def note(layers: Any, **more: object) -> str:
    return json.dumps({"format_version": "1.0", "layers": layers, **more})


def marker(said: object) -> Tensor:
    text = said if isinstance(said, bytes) else json.dumps(said).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


def test_a_note_and_marker_tensors_say_the_same(tmp_path: Path) -> None:
    assert read(tmp_path) == Marked()
    full = {**FP8, "full_precision_matrix_mult": True, "convrot": None}
    layers = {"a": Marker("float8_e4m3fn", {"full_precision_matrix_mult": True}), "b": Marker("nvfp4")}
    noted = read(tmp_path, note({"a": full, "b": NVFP4}))
    marked = read(tmp_path, None, {"a.comfy_quant": marker(full), "b.comfy_quant": marker(NVFP4)})
    both = read(tmp_path, note({"a": full}), {"a.comfy_quant": marker(full), "b.comfy_quant": marker(NVFP4)})
    assert noted.layers == marked.layers == both.layers == layers
    assert noted.metadata == both.metadata == {"_quantization_metadata"} and marked.metadata == frozenset()
    assert noted.tensors == {} and marked.tensors == both.tensors == {"a": "a.comfy_quant", "b": "b.comfy_quant"}
    assert noted.of("nvfp4", "mxfp8") == {"b": Marker("nvfp4")}
    assert read(tmp_path, json.dumps({"layers": {}})).metadata == {"_quantization_metadata"}


def test_options_stand_beside_the_format_or_in_an_object_of_their_own(tmp_path: Path) -> None:
    flat, nested = {"format": "int8_tensorwise", **GROUPS}, {"format": "int8_tensorwise", "params": GROUPS}
    said = read(tmp_path, note({"a": flat, "b": nested})).layers
    assert said["a"] == said["b"] == Marker("int8_tensorwise", GROUPS)


UNRECOGNISED = {
    "is stored as 'w4a8', which is not read": note({"a": {"format": "w4a8"}}),
    "'nvfp4' with 'rotation', whose meaning is not known": note({"a": {**NVFP4, "rotation": 3}}),
    "'nvfp4' with 'full_precision_matrix_mult'": note({"a": {**NVFP4, "full_precision_matrix_mult": 1}}),
    "'int8_tensorwise' with 'convrot_groupsize'": note({"a": {"format": "int8_tensorwise", "convrot_groupsize": "64"}}),
    "has version '2.0'; 1.0 is read": json.dumps({"format_version": "2.0", "layers": {}}),
    "unknown field `also`": note({}, also=1),
    "missing required field `layers`": "{}",
    "Expected `object`, got `array`": "[" * 100_000,
    "got `str`": note({"a": "nvfp4"}),
    "got `array`": note({"a": {"format": ["nvfp4"]}}),
    r"length <= 20000": note({str(n): NVFP4 for n in range(20_001)}),
}

CORRUPT = {
    "is not readable JSON": "{" * 100_000,
    "says how 'c' is stored, and has no such weight": note({"c": NVFP4}),
    "names no format": note({"a": {"full_precision_matrix_mult": True}}),
    "no one value of 'convrot'": note({"a": {"format": "int8_tensorwise", "convrot": False, "params": GROUPS}}),
    "params that are no options": note({"a": {**NVFP4, "params": 3}}),
    "at most 8388608 are read": note({}, also=" " * (8 << 20)),
}


@pytest.mark.parametrize("says", UNRECOGNISED | CORRUPT)
def test_notes_that_are_not_understood_are_refused(says: str, tmp_path: Path) -> None:
    began = perf_counter()
    with pytest.raises(CheckpointError, match=says) as told:
        read(tmp_path, (UNRECOGNISED | CORRUPT)[says])
    assert type(told.value) is (CheckpointUnrecognised if says in UNRECOGNISED else CheckpointCorrupt)
    assert "model.safetensors" in told.value.message and len(told.value.message) < 1000
    assert perf_counter() - began < 5


@pytest.mark.parametrize(
    ("says", "content"),
    [
        ("a.comfy_quant is not readable JSON", marker(b"\0\0\0")),
        ("a.comfy_quant is not readable JSON", marker(b'{"format": "\xff"}')),
        ("a.comfy_quant is not readable JSON", marker(b"{" * 4096)),
        ("a.comfy_quant has 4097 bytes", marker(b" " * 4097)),
        (r"a.comfy_quant is F32 \[4\], not bytes of JSON", torch.zeros(4)),
        (r"a.comfy_quant is U8 \[2, 2\], not bytes of JSON", torch.zeros(2, 2, dtype=torch.uint8)),
        ("a.comfy_quant contradicts what the file's metadata says", marker(FP8)),
    ],
)
def test_marker_tensors_that_are_not_understood_are_refused(says: str, content: Tensor, tmp_path: Path) -> None:
    with pytest.raises(CheckpointCorrupt, match=says):
        read(tmp_path, note({"a": NVFP4}), {"a.comfy_quant": content})
