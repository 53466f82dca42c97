"""nvfp4 of both dialects: one content is one thing in memory; its numbers are those of comfy-kitchen or diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_kitchen.backends.eager.quantization import dequantize_nvfp4 as kitchen
from comfy_kitchen.float_utils import to_blocked
from diffusers.quantizers.bfl.utils import dequantize_nvfp4 as diffusers
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.quantise.nvfp4 import CONFIG, quantise, quantise_for_diffusers
from mesh_core.errors import CheckpointCorrupt, CheckpointError, CheckpointUnrecognised
from mesh_core.formats import e2m1
from mesh_core.formats.blocks import from_tiles, to_tiles
from mesh_core.formats.nvfp4 import Nvfp4Format
from tests.formats.stored import read, same_bits, saved, weight

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
NOTE = {"_quantization_metadata": json.dumps({"layers": {"x": {"format": "nvfp4"}}})}
MODELOPT = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}


def comfy(rows: int = 272, columns: int = 96, seed: int = 0) -> dict[str, Tensor]:
    """As ComfyUI has it, where the tiles of scales are not full in either direction."""
    return quantise({"x.weight": weight(rows, columns, seed)}, ["x.weight"], "metadata")[0]


def other_dialect(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same content as diffusers and ModelOpt have it."""
    codes = tensors["x.weight"]
    rows, blocks = codes.shape[0], codes.shape[1] // 8
    scales = from_tiles(tensors["x.weight_scale"], 0, rows, blocks).view(torch.float8_e4m3fn)
    swapped = ((codes & 15) * 16) + codes // 16
    return tensors | {"x.weight": swapped, "x.weight_scale": scales, "x.input_scale": torch.tensor(0.5)}


@pytest.mark.parametrize("rows,columns", [(1, 1), (128, 4), (300, 23), (129, 8)])
def test_tiles_are_those_of_cublas(rows: int, columns: int) -> None:
    scales = torch.randint(0, 255, (rows, columns), dtype=torch.uint8)
    tiles = to_blocked(scales, flatten=False)
    assert torch.equal(to_tiles(scales), tiles)
    for start, stop in ((0, rows), (rows // 3, rows - rows // 4), (rows - 1, rows)):
        assert torch.equal(from_tiles(tiles, start, stop, columns), scales[start:stop])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_numbers_are_those_of_either_program(dtype: torch.dtype, tmp_path: Path) -> None:
    file = comfy()
    other = other_dialect(file)
    names = tuple(f"{program}/nvfp4-dequant/{DTYPES[dtype]}" for program in ("kitchen", "diffusers"))
    assert Nvfp4Format().arithmetics("E2M1", dtype, torch.device("cpu")) == names
    header = saved(tmp_path, file, NOTE)
    assert (header.tensors["x.weight"].dtype, header.tensors["x.weight"].shape) == ("nvfp4/E2M1", (272, 96))
    scale = file["x.weight_scale_2"]
    wanted = (
        kitchen(file["x.weight"], scale, file["x.weight_scale"], dtype),
        diffusers(other["x.weight"], other["x.weight_scale"], scale).to(dtype),
    )
    x = torch.randn(5, 96).to(dtype)
    for name, numbers in zip(names, wanted, strict=True):
        held = read(header, ("x.weight", 0, 272), dtype=dtype, arithmetic=name)
        assert same_bits(held.dense(), numbers)
        assert torch.equal(linear(x, held), linear(x, numbers))
    assert torch.equal(*wanted) == (dtype == torch.float32)
    assert read(header, ("x.weight", 0, 272), dtype=dtype).arithmetic == names[0]


def test_a_large_weight_is_unpacked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(3).view(6, 128)
    at_once = e2m1.unpacked(codes, torch.float32)
    monkeypatch.setattr(e2m1, "AT_ONCE", 100)
    assert torch.equal(e2m1.unpacked(codes, torch.float32), at_once)
    assert at_once[0, 2 * 0x1E : 2 * 0x1E + 2].tolist() == [0.5, -4.0]


@pytest.mark.parametrize("marking", ["metadata", "new"])
@pytest.mark.parametrize("config", [CONFIG, MODELOPT], ids=["bfl", "modelopt"])
def test_both_dialects_and_markings_are_the_same_in_memory(marking: Any, config: Any, tmp_path: Path) -> None:
    tensors, metadata = quantise({"x.weight": weight(272, 96)}, ["x.weight"], marking)
    headers = saved(tmp_path / "a", tensors, metadata), saved(tmp_path / "b", other_dialect(comfy()), {}, config)
    assert all(list(header.tensors) == ["x.weight"] for header in headers)
    for rows in ((0, 272), (100, 203), (271, 272)):
        first, second = (read(header, ("x.weight", *rows)) for header in headers)
        assert first.parts.keys() == second.parts.keys() == {"codes", "block_scales", "scale"}
        assert all(same_bits(part, second.parts[role]) for role, part in first.parts.items())


def test_rows_in_the_middle_of_a_tile_and_joined_weights(tmp_path: Path) -> None:
    file = comfy()
    more = {name.replace("x.", "y."): tensor for name, tensor in comfy(160, 96, seed=1).items()}
    note = json.dumps({"layers": {layer: {"format": "nvfp4"} for layer in "xy"}})
    header = saved(tmp_path, file | more, {"_quantization_metadata": note})
    upper = kitchen(file["x.weight"], file["x.weight_scale_2"], file["x.weight_scale"])
    lower = kitchen(more["y.weight"], more["y.weight_scale_2"], more["y.weight_scale"])
    assert file["x.weight_scale_2"] != more["y.weight_scale_2"]
    held = read(header, ("x.weight", 100, 203), ("y.weight", 1, 131))
    assert same_bits(held.dense(), torch.cat([upper[100:203], lower[1:131]]))
    stored = header.tensors["x.weight"].stored
    assert stored is not None and stored.format.nbytes(stored, 103 + 130) == held.nbytes == 233 * (48 + 6 + 4)


def test_what_fills_up_tiles_is_no_content(tmp_path: Path) -> None:
    file = comfy()
    used = to_tiles(torch.ones(272, 6, dtype=torch.uint8)).bool()
    filled = file["x.weight_scale"].view(torch.uint8).where(used, torch.tensor(0x7F, dtype=torch.uint8))
    header = saved(tmp_path / "a", file | {"x.weight_scale": filled.view(torch.float8_e4m3fn)}, NOTE)
    first, second = (read(h, ("x.weight", 0, 272)) for h in (header, saved(tmp_path / "b", file, NOTE)))
    assert all(same_bits(part, second.parts[role]) for role, part in first.parts.items())


def test_what_diffusers_writes(tmp_path: Path) -> None:
    file = quantise_for_diffusers({"x.weight": weight(40, 64), "n.weight": torch.ones(64)}, ["x.weight"])
    header = saved(tmp_path, file, {}, CONFIG)
    assert header.tensors["n.weight"].dtype == "F32"
    held = read(header, ("x.weight", 0, 40), arithmetic="diffusers/nvfp4-dequant/bf16")
    scales = file["x.weight_scale"], file["x.weight_scale_2"]
    assert same_bits(held.dense(), diffusers(file["x.weight"], *scales).bfloat16())


def test_what_could_be_either_is_refused(tmp_path: Path) -> None:
    square = comfy(128, 64)
    either = "could be nvfp4 as ComfyUI writes it or as diffusers and ModelOpt do"
    with pytest.raises(CheckpointUnrecognised, match=f"x {either}.*nothing says which"):
        saved(tmp_path, square)
    with pytest.raises(CheckpointUnrecognised, match=f"x {either}.*the one and config.json the other"):
        saved(tmp_path, square, NOTE, CONFIG)
    more = {name.replace("x.", "y."): tensor for name, tensor in square.items()}
    with pytest.raises(CheckpointUnrecognised, match=f"y {either}.*nothing says which"):
        saved(tmp_path, square | more, NOTE)
    with pytest.raises(CheckpointUnrecognised, match="quantization_config"):
        saved(tmp_path, square, {}, {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}})
    with pytest.raises(CheckpointUnrecognised, match="quantization_config"):
        saved(tmp_path, {"x.weight": torch.ones(2, 2)}, {}, CONFIG)
    with pytest.raises(CheckpointUnrecognised, match="cannot be done here"):
        read(saved(tmp_path, square, NOTE), ("x.weight", 0, 128), arithmetic="kitchen/nvfp4-mm/bf16").dense()


Change = Callable[[Tensor], Tensor | None]
"""What a tensor becomes, None to leave it out."""


BAD_HEADERS = {
    "no scales": ("x.weight_scale", lambda t: None, "lacks x.weight_scale,"),
    "no scale": ("x.weight_scale_2", lambda t: None, "lacks x.weight_scale_2,"),
    "short scales": ("x.weight_scale", lambda t: t[:128], r"x.weight_scale is F8_E4M3 \[128, [68]\]"),
    "scales of another type": ("x.weight_scale", lambda t: t.view(torch.uint8), "x.weight_scale is U8"),
    "two scales": ("x.weight_scale_2", lambda t: t.repeat(2), r"x.weight_scale_2 is F32 \[2\]"),
    "half a scale": ("x.weight_scale_2", lambda t: t.half(), "x.weight_scale_2 is F16"),
    "codes of another type": ("x.weight", lambda t: t.view(torch.int8), "x.weight is I8"),
    "columns": ("x.weight", lambda t: t[:, :44], r"x.weight has the shape \[272, 44\]"),
    "odd columns": ("x.weight", lambda t: t[:, :47], r"x.weight has the shape \[272, 47\]"),
    "no columns": ("x.weight", lambda t: t[:, :0], r"x.weight has the shape \[272, 0\]"),
    "a vector": ("x.weight", lambda t: t.flatten(), "x.weight has the shape"),
    "inputs": ("x.input_scale", lambda t: torch.ones(2), "x.input_scale is F32"),
}


@pytest.mark.parametrize("dialect", ["comfy", "diffusers"])
@pytest.mark.parametrize("name,change,message", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_headers_that_cannot_be(name: str, change: Change, message: str, dialect: str, tmp_path: Path) -> None:
    tensors = (comfy() | {"x.input_scale": torch.ones(())}) if dialect == "comfy" else other_dialect(comfy())
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    with pytest.raises(CheckpointCorrupt, match=message):
        if dialect == "comfy":
            saved(tmp_path, tensors, NOTE)
        else:
            saved(tmp_path, tensors, {}, CONFIG)


def test_the_other_dialects_scales_do_not_fit_a_marker(tmp_path: Path) -> None:
    with pytest.raises(CheckpointCorrupt, match=r"x.weight_scale is F8_E4M3 \[272, 6\]; its layer asks for .*384, 8"):
        saved(tmp_path, other_dialect(comfy()), NOTE)
    with pytest.raises(CheckpointCorrupt, match=r"x.weight_scale is F8_E4M3 \[384, 8\]; its layer asks for .*272, 6"):
        saved(tmp_path, comfy(), {}, CONFIG)


def byte(row: int, column: int, value: int) -> Callable[[Tensor], Tensor]:
    def change(tiles: Tensor) -> Tensor:
        scales = from_tiles(tiles, 0, 272, 6)
        scales[row, column] = value
        return to_tiles(scales).view(torch.float8_e4m3fn)

    return change


BAD_CONTENT = {
    "NaN": ("x.weight_scale", byte(150, 5, 0x7F), "no positive finite"),
    "negative": ("x.weight_scale", byte(150, 5, 0xB0), "no positive finite"),
    "zero": ("x.weight_scale", byte(150, 5, 0), "zero for a block of weights that are not zero"),
    "infinite for all": ("x.weight_scale_2", lambda t: t * float("inf"), "no positive finite"),
    "NaN for all": ("x.weight_scale_2", lambda t: t * float("nan"), "no positive finite"),
    "zero for all": ("x.weight_scale_2", lambda t: t * 0, "no positive finite"),
    "negative for all": ("x.weight_scale_2", lambda t: -t, "no positive finite"),
}


@pytest.mark.parametrize("name,change,message", BAD_CONTENT.values(), ids=BAD_CONTENT)
def test_scales_that_cannot_be(name: str, change: Callable[[Tensor], Tensor], message: str, tmp_path: Path) -> None:
    file = comfy()
    header = saved(tmp_path / "a", file | {name: change(file[name])}, NOTE)
    with pytest.raises(CheckpointError, match=f"{name} has .*{message}"):
        read(header, ("x.weight", 100, 203))
    if name == "x.weight_scale":  # rows that another worker has are not looked at
        assert read(header, ("x.weight", 0, 100)).dense().isfinite().all()


def test_a_scale_of_zero_belongs_to_a_block_of_zeros(tmp_path: Path) -> None:
    file = comfy()
    assert (from_tiles(file["x.weight_scale"], 0, 272, 6)[136, :3] == 0).all()
    signs = file["x.weight"].clone()
    signs[136, :24] = 0x88
    held = read(saved(tmp_path, file | {"x.weight": signs}, NOTE), ("x.weight", 0, 272))
    assert (held.dense()[136, :48] == 0).all()
