"""Files in 8-bit floats that are damaged, lack something, or could mean either of two things: refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.quantise.fp8 import fp8_cast, fp8_rows, fp8_scaled
from mesh_core.builtin import load_plugins
from mesh_core.errors import CheckpointCorrupt, CheckpointUnrecognised
from mesh_core.model.safetensors import TensorInfo
from tests.formats.stored import read, saved, weight
from tests.formats.test_fp8 import MARKINGS, QKV, model

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Tensors = dict[str, Tensor]


def marker(**said: object) -> Tensor:
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def new(**change: Tensor) -> Tensors:
    return fp8_scaled(model(), ["qkv.weight"])[0] | named(change)


def old(**change: Tensor) -> Tensors:
    return fp8_scaled(model(), ["qkv.weight"], "old")[0] | named(change)


def rows(**change: Tensor) -> Tensors:
    return fp8_rows(model(), ["qkv.weight"])[0] | named(change)


def cast(**change: Tensor) -> Tensors:
    return fp8_cast(model(), ["qkv.weight"]) | named(change)


def named(change: dict[str, Tensor]) -> Tensors:
    return {name.replace("__", "."): tensor for name, tensor in change.items()}


def without(tensors: Tensors, name: str) -> Tensors:
    return {n: t for n, t in tensors.items() if n != name}


CORRUPT: dict[str, tuple[str, Callable[[], Tensors]]] = {
    "some rows' scales lost": (
        r"out.weight is in 8-bit floats without scales, where qkv.weight has one for each row",
        lambda: without(fp8_rows(model(), ["qkv.weight", "out.weight"])[0], "out.weight_scale"),
    ),
    "no scale": (
        r"lacks qkv.weight_scale, which belongs to a quantised layer",
        lambda: without(new(), "qkv.weight_scale"),
    ),
    "no weight": (r"says how 'qkv' is stored, and has no such weight", lambda: without(new(), "qkv.weight")),
    "no weight, old": (r"has qkv.scale_weight and no qkv.weight", lambda: without(old(), "qkv.weight")),
    "scale of rows": (r"qkv.weight_scale is F32 \[48\]", lambda: new(qkv__weight_scale=torch.ones(48))),
    "scale of rows, old": (r"qkv.scale_weight is F32 \[48\]", lambda: old(qkv__scale_weight=torch.ones(48))),
    "scale in two dimensions": (r"weight_scale is F32 \[1, 1\]", lambda: new(qkv__weight_scale=torch.ones(1, 1))),
    "half a scale": (r"weight_scale is F16 \[\]", lambda: new(qkv__weight_scale=torch.tensor(1.0).half())),
    "many input scales": (r"input_scale is F32 \[2\]", lambda: new(qkv__input_scale=torch.ones(2))),
    "rows of another count": (
        r"47 scales for a weight of shape \[48, 64\]",
        lambda: rows(qkv__weight_scale=torch.ones(47)),
    ),
    "marked as nvfp4": (r"qkv.weight is F8_E4M3; .* asks for U8", lambda: new(qkv__comfy_quant=marker(format="nvfp4"))),
    "marker that is no bytes": (r"comfy_quant is F32 \[3\]", lambda: new(qkv__comfy_quant=torch.ones(3))),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_companions_that_do_not_fit_are_refused_by_name(case: str, tmp_path: Path) -> None:
    says, tensors = CORRUPT[case]
    with pytest.raises(CheckpointCorrupt, match=says) as told:
        saved(tmp_path, tensors(), {})
    assert str(tmp_path) in told.value.message


UNRECOGNISED: dict[str, tuple[str, Callable[[], Tensors]]] = {
    "no marker": (r"qkv.weight_scale and no marker", lambda: without(new(), "qkv.comfy_quant")),
    "no marker, old": (r"qkv.scale_weight and no marker", lambda: without(old(), "scaled_fp8")),
    "marker of another prefix": (
        r"qkv.scale_weight and no marker",
        lambda: without(old(clip__scaled_fp8=torch.zeros(0).to(E4M3)), "scaled_fp8"),
    ),
    "both markings": (r"markers of two kinds, scaled_fp8", lambda: new(scaled_fp8=torch.zeros(0).to(E4M3))),
    "old scale beside a new one": (
        r"qkv.scale_weight and no marker",
        lambda: new(qkv__scale_weight=torch.tensor(1.0)),
    ),
    "codes in bfloat16": (
        r"qkv.weight is stored in F8_E4M3 with a scale, and has it in BF16",
        lambda: new(qkv__weight=new()["qkv.weight"].bfloat16()),
    ),
    "codes in bfloat16, old": (
        r"qkv.weight is stored in F8_E4M3 with a scale, and has it in BF16",
        lambda: old(qkv__weight=old()["qkv.weight"].bfloat16()),
    ),
    "codes in bfloat16, by row": (
        r"qkv.weight_scale belongs to no format",
        lambda: rows(qkv__weight=rows()["qkv.weight"].bfloat16()),
    ),
    "marker of another type": (
        r"F8_E5M2 with a scale, and has it in F8_E4M3",
        lambda: old(scaled_fp8=torch.zeros(2).to(E5M2)),
    ),
    "marker with content": (r"scaled_fp8 is F8_E4M3 \[3\]", lambda: old(scaled_fp8=torch.zeros(3).to(E4M3))),
    "no matrix": (
        r"a scale for qkv.weight, which is no matrix: \[3, 2, 2, 2\]",
        lambda: new(qkv__weight=torch.zeros(3, 2, 2, 2).to(E4M3)),
    ),
    "unknown format": (r"'qkv' is that it is stored as 'w4a8'", lambda: new(qkv__comfy_quant=marker(format="w4a8"))),
    "e5m2 by row": (r"qkv.weight_scale belongs to no format", lambda: rows(qkv__weight=weight(48, 64).to(E5M2))),
    "one row": (r"one.weight_scale and no marker", lambda: fp8_rows({"one.weight": weight(1, 64)}, ["one.weight"])[0]),
    "scales of blocks": (r"qkv.weight_scale_inv beside it", lambda: cast(qkv__weight_scale_inv=torch.ones(3, 4))),
    "a quantiser of ModelOpt": (
        r"qkv.weight in F8_E4M3 with qkv.weight_quantizer._scale beside it",
        lambda: cast(qkv__weight_quantizer___scale=torch.ones(1)),
    ),
    "an input scale alone": (r"qkv.input_scale belongs to no format", lambda: cast(qkv__input_scale=torch.tensor(1.0))),
}


@pytest.mark.parametrize("case", UNRECOGNISED)
def test_what_could_mean_several_things_is_refused_by_name(case: str, tmp_path: Path) -> None:
    says, tensors = UNRECOGNISED[case]
    with pytest.raises(CheckpointUnrecognised, match=says) as told:
        saved(tmp_path, tensors(), {})
    assert str(tmp_path) in told.value.message and told.value.hint


@pytest.mark.parametrize("config", [{"quant_method": "modelopt", "quant_type": "FP8"}, {"quant_method": "fp8"}, "bfl"])
def test_folders_that_say_they_are_quantised_otherwise_are_refused(config: object, tmp_path: Path) -> None:
    said = {"quantization_config": config}
    for tensors in (rows(), cast(), new()):
        with pytest.raises(CheckpointUnrecognised, match=r"its config.json says so \(quantization_config\)"):
            saved(tmp_path, tensors, {}, said)
    said = {"quantization_config": {"quant_method": "bfl"}}
    assert saved(tmp_path, rows(), {}, said).tensors["qkv.weight"].dtype == "fp8-row/F8_E4M3"
    with pytest.raises(CheckpointUnrecognised, match=r"its config.json says so"):
        saved(tmp_path, cast(), {}, said)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0], ids=str)
def test_scales_that_are_no_positive_finite_numbers_are_refused(value: float, tmp_path: Path) -> None:
    bad = torch.tensor(value)
    some = torch.ones(48)
    some[40] = value
    for name, tensors in (
        ("qkv.weight_scale", new(qkv__weight_scale=bad)),
        ("qkv.scale_weight", old(qkv__scale_weight=bad[None])),
        ("qkv.input_scale", new(qkv__input_scale=bad)),
        ("qkv.weight_scale", rows(qkv__weight_scale=some)),
    ):
        header = saved(tmp_path, tensors, {})
        with pytest.raises(CheckpointCorrupt, match=f": {name} has scales that are no positive finite numbers"):
            read(header, QKV)
    assert read(header, ("qkv.weight", 0, 40)).shape == (40, 64)


@pytest.mark.parametrize(
    ("dtype", "code"), [(E4M3, 0x7F), (E4M3, 0xFF), (E5M2, 0x7C), (E5M2, 0x7D), (E5M2, 0xFF)], ids=str
)
def test_codes_that_are_no_numbers_are_refused(dtype: torch.dtype, code: int, tmp_path: Path) -> None:
    def damaged(tensors: Tensors) -> Tensors:
        tensors["qkv.weight"].view(torch.uint8)[30, 7] = code
        return tensors

    written = [fp8_scaled(model(), ["qkv.weight"], m, dtype=dtype) for m in MARKINGS]
    written += [(fp8_cast(model(), ["qkv.weight"], dtype), {})] + ([(rows(), {})] if dtype == E4M3 else [])
    for tensors, metadata in written:
        header = saved(tmp_path, damaged(tensors), metadata)
        with pytest.raises(CheckpointCorrupt, match=r": qkv\.weight has codes that are no finite numbers"):
            read(header, QKV)
        assert read(header, ("qkv.weight", 0, 30)).shape == (30, 64)


def test_mixed_files_are_read_layer_by_layer(tmp_path: Path) -> None:
    """Scaled layers beside plain 8-bit floats and bfloat16, under a prefix, beside another model with its own."""
    tensors, metadata = fp8_scaled(
        {"dit.a.weight": weight(48, 64), "dit.b.weight": weight(48, 64)}, ["dit.a.weight"], "old"
    )
    tensors = fp8_cast(tensors, ["dit.b.weight"])
    tensors["dit.scaled_fp8"] = tensors.pop("scaled_fp8")
    tensors |= {f"clip.{n}": t for n, t in old().items()} | {"clip.scaled_fp8": torch.zeros(2).to(E4M3)}
    found: dict[str, TensorInfo] = dict(saved(tmp_path, tensors, metadata).tensors)
    assert {name: info.dtype for name, info in found.items() if name.endswith(".weight")} == {
        "dit.a.weight": "fp8-scaled/F8_E4M3",
        "dit.b.weight": "fp8-cast/F8_E4M3",
        "clip.qkv.weight": "fp8-scaled/F8_E4M3-full",
        "clip.out.weight": "BF16",
        "clip.norm.weight": "BF16",
    }
    assert not any(name.rpartition(".")[2] in ("scaled_fp8", "scale_weight") for name in found)
    mixed = fp8_scaled(rows(), ["out.weight"])[0]
    assert saved(tmp_path, mixed, {}).tensors["out.weight"].dtype == "fp8-scaled/F8_E4M3"
    assert saved(tmp_path, mixed, {}).tensors["qkv.weight"].dtype == "fp8-row/F8_E4M3"
    two = fp8_scaled(fp8_scaled(model(), ["qkv.weight"])[0], ["out.weight"], dtype=E5M2)[0]
    assert saved(tmp_path, two, {}).tensors["out.weight"].dtype == "fp8-scaled/F8_E5M2"


def test_weights_of_different_scales_are_not_joined(tmp_path: Path) -> None:
    header = saved(tmp_path, *fp8_scaled(model(), ["qkv.weight", "out.weight"]))
    with pytest.raises(CheckpointUnrecognised, match="different scales"):
        read(header, QKV, ("out.weight", 0, 48))


def test_the_formats_are_registered() -> None:
    assert {"fp8-cast", "fp8-row", "fp8-scaled"} <= load_plugins().weight_formats().keys()
