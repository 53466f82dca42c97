"""FLUX.2 and Klein: every cut equals diffusers' own forward bit for bit, from every layout of the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mesh_core.errors import CheckpointCorrupt, CheckpointUnrecognised, UnsupportedInput
from mesh_core.model import ModelAdapter, read_header
from mesh_core.testing import check_every_cut, check_reads_only_its_own, check_recognises_without_data
from mesh_flux2 import Flux2Adapter
from mesh_klein import KleinAdapter
from tests.adapters import tiny

FAMILIES = [pytest.param(Flux2Adapter(), id="flux2"), pytest.param(KleinAdapter(), id="klein")]
DTYPES = [torch.float32, torch.bfloat16]


def _guided(adapter: ModelAdapter) -> bool:
    return adapter.family == "flux2"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter", FAMILIES)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({}, id="square"),
        pytest.param({"batch": 2, "height": 3, "width": 7}, id="batch 2, not square"),
        pytest.param({"references": 2}, id="two reference images"),
    ],
)
def test_every_cut_is_exact(adapter: ModelAdapter, dtype: torch.dtype, shape: dict[str, int], tmp_path: Path) -> None:
    model = tiny.transformer(guidance=_guided(adapter), dtype=dtype)
    model.save_pretrained(tmp_path)
    inputs = tiny.inputs(guidance=_guided(adapter), dtype=dtype, **shape)
    permuted = {**inputs, "hidden_states": inputs["hidden_states"].mT.contiguous().mT}
    assert check_every_cut(adapter, read_header(tmp_path), model, inputs, permuted) == 7


def test_guidance_may_be_left_out_of_a_guided_model(tmp_path: Path) -> None:
    model = tiny.transformer(guidance=True)
    model.save_pretrained(tmp_path)
    check_every_cut(Flux2Adapter(), read_header(tmp_path), model, tiny.inputs(guidance=False))


@pytest.mark.parametrize(("doubles", "singles"), [(1, 2), (3, 0), (0, 3)])
def test_unusual_stacks(doubles: int, singles: int, tmp_path: Path) -> None:
    model = tiny.transformer(guidance=False, doubles=doubles, singles=singles)
    model.save_pretrained(tmp_path)
    check_every_cut(KleinAdapter(), read_header(tmp_path), model, tiny.inputs(guidance=False))


@pytest.mark.parametrize("adapter", FAMILIES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_single_files_are_the_same_model(adapter: ModelAdapter, prefix: str, tmp_path: Path) -> None:
    model = tiny.transformer(guidance=_guided(adapter))
    file = tmp_path / "model.safetensors"
    tiny.save_single_file(model, file, prefix)
    header = read_header(file)
    spec = adapter.recognise(header)
    assert spec is not None
    assert {k: spec.config[k] for k in spec.config} == {k: model.config[k] for k in spec.config} | {
        "out_channels": 16,
        "mlp_ratio": 3.0,
        "axes_dims_rope": (8, 8, 8, 8),
    }
    check_every_cut(adapter, header, model, tiny.inputs(guidance=_guided(adapter)))


@pytest.mark.parametrize("adapter", FAMILIES)
@pytest.mark.parametrize("layout", ["sharded folder", "single file"])
def test_stages_read_only_their_own_tensors(adapter: ModelAdapter, layout: str, tmp_path: Path) -> None:
    model = tiny.transformer(guidance=_guided(adapter))
    path = tmp_path / "model.safetensors"
    if layout == "single file":
        tiny.save_single_file(model, path)
    else:
        path = tmp_path / "folder"
        model.save_pretrained(path, max_shard_size="200KB")
        assert len(list(path.glob("*.safetensors"))) > 1
        check_every_cut(adapter, read_header(path), model, tiny.inputs(guidance=_guided(adapter)))
    check_reads_only_its_own(adapter, read_header(path))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    check_recognises_without_data(adapter, path, scratch)


def test_families_tell_each_other_apart(tmp_path: Path) -> None:
    for guidance, name in ((True, "dev"), (False, "klein")):
        tiny.transformer(guidance=guidance).save_pretrained(tmp_path / name)
    dev, klein = read_header(tmp_path / "dev"), read_header(tmp_path / "klein")
    assert Flux2Adapter().recognise(klein) is None and KleinAdapter().recognise(dev) is None
    assert Flux2Adapter().recognise(dev) and KleinAdapter().recognise(klein)


def test_the_blocks_cover_the_weights(tmp_path: Path) -> None:
    model = tiny.transformer(guidance=False)
    model.save_pretrained(tmp_path)
    spec = KleinAdapter().recognise(read_header(tmp_path))
    assert spec is not None and spec.block_kinds == ("double",) * 2 + ("single",) * 3
    assert sum(p.elements for p in spec.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert set(spec.parameters_of(spec.span(":"))) == set(spec.parameters)
    assert not spec.parameters_of(spec.span("2:2"))


def test_a_foreign_model_is_nobodys(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    assert KleinAdapter().recognise(read_header(tmp_path / "other.safetensors")) is None


def _without(path: Path, name: str) -> None:
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tiny.save_single_file(tiny.transformer(guidance=False), file)
    _without(file, "double_blocks.1.img_attn.qkv.weight")
    with pytest.raises(CheckpointCorrupt, match=r"double_blocks\.1\.img_attn\.qkv\.weight"):
        KleinAdapter().recognise(read_header(file))


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tiny.save_single_file(tiny.transformer(guidance=False), file)
    tensors = load_file(file)
    tensors["single_blocks.0.linear2.weight"] = torch.zeros(64, 8)
    save_file(tensors, file)
    with pytest.raises(CheckpointCorrupt, match="do not fit"):
        KleinAdapter().recognise(read_header(file))


def test_quantised_weights_are_refused_by_type(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tiny.save_single_file(tiny.transformer(guidance=False), file)
    tensors = load_file(file)
    name = "single_blocks.0.linear1.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, file)
    with pytest.raises(CheckpointUnrecognised, match="F8_E4M3"):
        KleinAdapter().recognise(read_header(file))


@pytest.mark.parametrize(
    "extra", [{"joint_attention_kwargs": {"ip_adapter_masks": 1}}, {"kv_cache_mode": "extract"}], ids=str
)
def test_what_cannot_cross_is_refused_by_name(extra: dict[str, object], tmp_path: Path) -> None:
    tiny.transformer(guidance=False).save_pretrained(tmp_path)
    adapter = KleinAdapter()
    spec = adapter.recognise(read_header(tmp_path))
    assert spec is not None
    with pytest.raises(UnsupportedInput, match=next(iter(extra))):
        adapter.begin(spec, {**tiny.inputs(guidance=False), **extra})
