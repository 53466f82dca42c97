"""int8 as ComfyUI writes it: one scale or one per row, rotated or not; the numbers are those of comfy-kitchen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_kitchen.backends.eager.quantization import dequantize_int8_convrot_weight, dequantize_int8_simple
from comfy_kitchen.tensor.int8_utils import _build_hadamard
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.quantise.fp8 import Written
from benchmarks.quantise.int8 import quantise
from mesh_core.errors import CheckpointCorrupt, CheckpointUnrecognised
from mesh_core.formats import int8
from mesh_core.formats.int8 import _GROUPS, Int8Format, rotation
from tests.formats.stored import read, same_bits, saved, weight

CPU = torch.device("cpu")
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
LAYOUTS: dict[str, dict[str, Any]] = {"one": {}, "rows": {"per_row": True}, "rotated": {"group": 64}}


def made(layout: str, rows: int = 300, seed: int = 0, marking: Any = "metadata") -> Written:
    return quantise({"x.weight": weight(rows, 192, seed)}, ["x.weight"], marking, **LAYOUTS[layout])


def kitchen(layout: str, file: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    parts = file["x.weight"], file["x.weight_scale"]
    if layout == "rotated":
        return dequantize_int8_convrot_weight(*parts, 64).to(dtype)
    return dequantize_int8_simple(*parts).to(dtype)


def note(**options: Any) -> dict[str, str]:
    return {"_quantization_metadata": json.dumps({"layers": {"x": {"format": "int8_tensorwise", **options}}})}


@pytest.mark.parametrize("group", _GROUPS)
def test_rotations_are_those_of_comfy_kitchen(group: int) -> None:
    assert torch.equal(rotation(group, CPU), _build_hadamard(group))
    assert torch.equal(rotation(group, CPU) @ rotation(group, CPU), torch.eye(group))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_numbers_are_those_of_comfy_kitchen(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    file, metadata = made(layout)
    header = saved(tmp_path, file, metadata)
    kind = "I8_ROT64" if layout == "rotated" else "I8"
    assert (header.tensors["x.weight"].dtype, header.tensors["x.weight"].shape) == (f"int8/{kind}", (300, 192))
    numbers = kitchen(layout, file, dtype)
    held = read(header, ("x.weight", 0, 300), dtype=dtype)
    way = "convrot-dequant" if layout == "rotated" else "dequant"
    assert held.arithmetic == f"kitchen/int8-{way}/{DTYPES[dtype]}" and same_bits(held.dense(), numbers)
    assert (numbers - weight(300, 192).to(dtype)).abs().max() < 2e-3
    x = torch.randn(5, 192).to(dtype)
    part = read(header, ("x.weight", 100, 203), dtype=dtype)
    assert torch.equal(linear(x, part), linear(x, numbers[100:203]))
    with pytest.raises(CheckpointUnrecognised, match="cannot be done here"):
        read(header, ("x.weight", 0, 8), arithmetic="kitchen/int8-mm").dense()


def test_a_large_weight_is_rotated_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, metadata = made("rotated")
    held = read(saved(tmp_path, file, metadata), ("x.weight", 0, 300))
    whole = held.format.transient(held.kind, (300, 192), torch.bfloat16)
    monkeypatch.setattr(int8, "AT_ONCE", 100 * 192)
    assert whole - held.format.transient(held.kind, (300, 192), torch.bfloat16) == 200 * 192 * 8
    assert same_bits(held.dense(), kitchen("rotated", file))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_markings_are_the_same_in_memory(layout: str, tmp_path: Path) -> None:
    headers = [saved(tmp_path / marking, *made(layout, marking=marking)) for marking in ("metadata", "new")]
    assert all(list(header.tensors) == ["x.weight"] for header in headers)
    first, second = (read(header, ("x.weight", 7, 300)) for header in headers)
    assert first.parts.keys() == {"codes", "scale"} and first.label == second.label
    assert all(same_bits(part, second.parts[role]) for role, part in first.parts.items())


def test_one_scale_is_one_for_every_row(tmp_path: Path) -> None:
    file, metadata = made("one")
    scale = file["x.weight_scale"]
    scales = [scale, scale.view(1), scale.repeat(300), scale.repeat(300, 1)]
    held = [
        read(saved(tmp_path / str(n), file | {"x.weight_scale": scale}, metadata), ("x.weight", 7, 300))
        for n, scale in enumerate(scales)
    ]
    assert all(same_bits(one.parts[role], held[0].parts[role]) for one in held for role in ("codes", "scale"))
    assert held[0].parts["scale"].shape == (293,)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_joined_rows_of_two_weights(layout: str, tmp_path: Path) -> None:
    (file, metadata), (more, _) = made(layout), made(layout, 40, 1)
    said = json.loads(metadata["_quantization_metadata"])["layers"]["x"]
    both = file | {name.replace("x.", "y."): tensor for name, tensor in more.items()}
    header = saved(tmp_path, both, {"_quantization_metadata": json.dumps({"layers": {"x": said, "y": said}})})
    held = read(header, ("x.weight", 100, 203), ("y.weight", 3, 40))
    assert same_bits(held.dense(), torch.cat([kitchen(layout, file)[100:203], kitchen(layout, more)[3:]]))
    stored = header.tensors["x.weight"].stored
    assert stored is not None and stored.format.nbytes(stored, 103 + 37) == held.nbytes == 140 * (192 + 4)


def test_the_marker_alone_says_whether_a_weight_is_rotated(tmp_path: Path) -> None:
    file = made("rows")[0]
    for number, (options, kind) in enumerate(
        [
            ({}, "I8"),
            ({"convrot": False, "convrot_groupsize": 64}, "I8"),
            ({"convrot": True, "convrot_groupsize": 16}, "I8_ROT16"),
            ({"per_row": True}, "I8"),
        ]
    ):
        header = saved(tmp_path / f"a-convrot-{number}", file, note(**options))
        assert header.tensors["x.weight"].dtype == f"int8/{kind}"
    wide, _ = quantise({"x.weight": weight(4, 512)}, ["x.weight"], "metadata", group=256)
    assert saved(tmp_path / "b", wide, note(convrot=True)).tensors["x.weight"].dtype == "int8/I8_ROT256"
    for kind in ("I8_ROT", "I8_ROT32", "I8_ROT4096", "I8_ROT65536", "I4"):
        assert Int8Format().arithmetics(kind, torch.bfloat16, CPU) == ()


BAD_MARKERS: dict[str, tuple[dict[str, Any], str]] = {
    "group": ({"convrot": True, "convrot_groupsize": 32}, "groups of 32 columns are rotated"),
    "no group": ({"convrot": True, "convrot_groupsize": 0}, "groups of 0 columns"),
    "huge group": ({"convrot": True, "convrot_groupsize": 1 << 40}, "groups of 1099511627776 columns"),
    "text": ({"convrot": True, "convrot_groupsize": "64"}, "convrot_groupsize., whose meaning is not known"),
    "does not divide": ({"convrot": True}, "groups of 256 columns are rotated; there are 192"),
    "neither": ({"convrot": "no", "convrot_groupsize": 64}, "convrot., whose meaning is not known"),
    "one per row": ({"per_row": False}, "x.weight_scale is F32"),
    "unknown": ({"zero_point": 1}, "zero_point"),
}


@pytest.mark.parametrize("options,message", BAD_MARKERS.values(), ids=BAD_MARKERS)
def test_markers_that_cannot_be(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((CheckpointCorrupt, CheckpointUnrecognised), match=message):
        saved(tmp_path, made("rows")[0], note(**options))


BAD_HEADERS: dict[str, tuple[str, Callable[[Tensor], Tensor | None], str]] = {
    "no scale": ("x.weight_scale", lambda t: None, "lacks x.weight_scale,"),
    "some rows": ("x.weight_scale", lambda t: t[:299], r"x.weight_scale is F32 \[299, 1\]"),
    "columns": ("x.weight_scale", lambda t: t[:192].T, r"x.weight_scale is F32 \[1, 192\]"),
    "half": ("x.weight_scale", lambda t: t.half(), "x.weight_scale is F16"),
    "codes of another type": ("x.weight", lambda t: t.view(torch.uint8), "x.weight is U8"),
    "a vector": ("x.weight", lambda t: t.flatten(), "x.weight has the shape"),
}


@pytest.mark.parametrize("name,change,message", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_headers_that_cannot_be(
    name: str, change: Callable[[Tensor], Tensor | None], message: str, tmp_path: Path
) -> None:
    file, metadata = made("rows")
    changed = change(file.pop(name))
    with pytest.raises(CheckpointCorrupt, match=message):
        saved(tmp_path, file | ({} if changed is None else {name: changed}), metadata)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -0.001])
def test_scales_that_cannot_be(value: float, tmp_path: Path) -> None:
    for layout in ("one", "rows"):
        file, metadata = made(layout)
        file["x.weight_scale"].view(-1)[150 if layout == "rows" else 0] = value
        header = saved(tmp_path / layout, file, metadata)
        with pytest.raises(CheckpointCorrupt, match=r"x.weight_scale has scales that are no positive"):
            read(header, ("x.weight", 100, 203))
