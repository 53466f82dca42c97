"""mxfp8 as ComfyUI writes it: the numbers are those of comfy-kitchen, for any rows, and no scale is believed unseen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comfy_kitchen.backends.eager.quantization import dequantize_mxfp8 as kitchen
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.quantise.mxfp8 import quantise
from mesh_core.errors import CheckpointCorrupt, CheckpointUnrecognised
from mesh_core.formats.blocks import from_tiles, to_tiles
from tests.formats.stored import read, same_bits, saved, weight

NOTE = {"_quantization_metadata": json.dumps({"layers": {"x": {"format": "mxfp8"}}})}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def file_of(rows: int = 288, columns: int = 96, seed: int = 0) -> dict[str, Tensor]:
    return quantise({"x.weight": weight(rows, columns, seed)}, ["x.weight"], "metadata")[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_numbers_are_those_of_comfy_kitchen(dtype: torch.dtype, tmp_path: Path) -> None:
    file = file_of()
    exponents = from_tiles(file["x.weight_scale"], 0, 288, 3)
    exponents[0] = torch.tensor([1, 200, 254])  # where bfloat16 has fewer bits, and beyond what float16 has
    file["x.weight_scale"] = to_tiles(exponents).view(torch.float8_e8m0fnu)
    header = saved(tmp_path, file, NOTE)
    assert (header.tensors["x.weight"].dtype, header.tensors["x.weight"].shape) == ("mxfp8/F8_E4M3", (288, 96))
    numbers = kitchen(file["x.weight"], file["x.weight_scale"], dtype)
    held = read(header, ("x.weight", 0, 288), dtype=dtype)
    assert held.arithmetic == f"kitchen/mxfp8-dequant/{DTYPES[dtype]}" and same_bits(held.dense(), numbers)
    x = torch.randn(5, 96).to(dtype)
    part = read(header, ("x.weight", 100, 203), dtype=dtype)
    assert torch.equal(linear(x, part), linear(x, numbers[100:203]))
    with pytest.raises(CheckpointUnrecognised, match="cannot be done here"):
        read(header, ("x.weight", 0, 8), arithmetic="kitchen/mxfp8-mm").dense()


def test_both_markings_and_types_of_scales_are_the_same_in_memory(tmp_path: Path) -> None:
    tensors, metadata = quantise({"x.weight": weight(288, 96)}, ["x.weight"], "new")
    plain = file_of() | {"x.weight_scale": file_of()["x.weight_scale"].view(torch.uint8)}
    first, second = saved(tmp_path / "a", tensors, metadata), saved(tmp_path / "b", plain, NOTE)
    assert tensors["x.weight_scale"].dtype == torch.float8_e8m0fnu and list(first.tensors) == ["x.weight"]
    for rows in ((0, 288), (100, 203)):
        one, other = (read(header, ("x.weight", *rows)) for header in (first, second))
        assert one.parts.keys() == other.parts.keys() == {"codes", "block_scales"}
        assert all(same_bits(part, other.parts[role]) for role, part in one.parts.items())


def test_codes_that_are_no_numbers(tmp_path: Path) -> None:
    file = file_of()
    file["x.weight"].view(torch.uint8)[150, 7] = 0xFF
    with pytest.raises(CheckpointCorrupt, match=r"x.weight has codes that are no finite numbers"):
        read(saved(tmp_path, file, NOTE), ("x.weight", 100, 203))


def test_joined_rows_of_two_weights(tmp_path: Path) -> None:
    file, more = file_of(), {name.replace("x.", "y."): tensor for name, tensor in file_of(32, 96, 1).items()}
    note = json.dumps({"layers": {layer: {"format": "mxfp8"} for layer in "xy"}})
    header = saved(tmp_path, file | more, {"_quantization_metadata": note})
    upper, lower = kitchen(*file.values()), kitchen(*more.values())
    held = read(header, ("x.weight", 127, 200), ("y.weight", 3, 32))
    assert same_bits(held.dense(), torch.cat([upper[127:200], lower[3:]]))
    stored = header.tensors["x.weight"].stored
    assert stored is not None and stored.format.nbytes(stored, 73 + 29) == held.nbytes == 102 * (96 + 3)


BAD_HEADERS: dict[str, tuple[str, Callable[[Tensor], Tensor | None], str]] = {
    "no scales": ("x.weight_scale", lambda t: None, "lacks x.weight_scale,"),
    "short scales": ("x.weight_scale", lambda t: t[:128], r"x.weight_scale is F8_E8M0 \[128, 4\]"),
    "scales by rows": ("x.weight_scale", lambda t: t[:288, :3], r"x.weight_scale is F8_E8M0 \[288, 3\]"),
    "scales of another type": ("x.weight_scale", lambda t: t.float(), "x.weight_scale is F32"),
    "codes of another type": ("x.weight", lambda t: t.view(torch.uint8), "x.weight is U8"),
    "columns": ("x.weight", lambda t: t[:, :80], r"x.weight has the shape \[288, 80\]"),
}


@pytest.mark.parametrize("name,change,message", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_headers_that_cannot_be(
    name: str, change: Callable[[Tensor], Tensor | None], message: str, tmp_path: Path
) -> None:
    file = file_of()
    changed = change(file.pop(name))
    with pytest.raises(CheckpointCorrupt, match=message):
        saved(tmp_path, file | ({} if changed is None else {name: changed}), NOTE)


@pytest.mark.parametrize(
    "value,message", [(255, "no positive finite"), (0, "zero for a block of weights that are not zero")]
)
def test_scales_that_cannot_be(value: int, message: str, tmp_path: Path) -> None:
    file = file_of()
    exponents = from_tiles(file["x.weight_scale"], 0, 288, 3)
    assert exponents[144, 0] == 0  # of zeros, where it may be
    exponents[150, 2] = value
    header = saved(tmp_path, file | {"x.weight_scale": to_tiles(exponents)}, NOTE)
    with pytest.raises(CheckpointCorrupt, match=f"x.weight_scale has .*{message}"):
        read(header, ("x.weight", 100, 203))
    assert (read(header, ("x.weight", 100, 150)).dense()[44, :48] == 0).all()
