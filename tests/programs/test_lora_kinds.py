"""Kinds of LoRA that PEFT knows, and unusual files: on a split pipeline they do what they do on a whole one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig
from safetensors.torch import load_file

import mesh_core
from mesh_core.builtin import load_plugins
from mesh_core.errors import LoraError, LoraMissing, LoraUnmatched, UnsupportedInput
from mesh_core.plugins.registry import Plugins
from mesh_core.programs.diffusers import stats
from tests.support import loras, pipelines
from tests.support.workers import mesh_home, thread_workers

pytestmark = pytest.mark.filterwarnings("ignore")

MODULES = ("to_q", "to_qkv_mlp_proj", "proj_out")


@dataclass
class Rig:
    folder: Path
    plugins: Plugins
    addresses: list[str]

    def whole(self) -> Any:
        return Flux2KleinPipeline.from_pretrained(self.folder / "klein", dtype=torch.float32)

    def split(self, pipeline: Any = None, **options: Any) -> Any:
        pipeline = pipeline or self.whole()
        return mesh_core.split(pipeline, local=":1", workers=self.addresses, plugins=self.plugins, **options)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder, plugins = tmp_path_factory.mktemp("models"), load_plugins()
    pipelines.save(folder / "klein", dtype=torch.float32)
    with mesh_home(tmp_path_factory.mktemp("home")):
        with thread_workers(folder / "klein", 1, "inproc", plugins=plugins) as workers:
            yield Rig(folder, plugins, [w.address for w in workers])


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


PATTERNS = {
    "alpha_pattern": {r".*single.*\.attn\..*": 20, "to_q": 1},
    "rank_pattern": {r"transformer_blocks\.\d+\..*": 2},
}
TARGETS: dict[str, Any] = {"target_modules": list(MODULES)}
CONFIGS = {
    "plain": LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **TARGETS),
    "rank-stabilised": LoraConfig(r=4, lora_alpha=6, use_rslora=True, init_lora_weights=False, **TARGETS),
    "patterns": LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **PATTERNS, **TARGETS),
    "dora": LoraConfig(r=4, lora_alpha=6, use_dora=True, init_lora_weights=False, **TARGETS),
    "lokr": LoKrConfig(r=4, alpha=6, init_weights=False, decompose_factor=4, **TARGETS),
    "loha": LoHaConfig(r=4, alpha=6, init_weights=False, **TARGETS),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_peft_put_in_before_the_split(rig: Rig, kind: str) -> None:
    pipeline, plain = rig.whole(), pipelines.run(rig.whole())
    torch.manual_seed(1)
    pipeline.transformer.add_adapter(CONFIGS[kind], "ink")
    expected = pipelines.run(pipeline)
    assert (expected - plain).abs().max() > 1e-3
    rig.split(pipeline)
    assert_same(pipelines.run(pipeline), expected)
    pipeline.set_adapters("ink", 0.5)
    half = pipelines.run(pipeline)
    mesh_core.unsplit(pipeline)
    assert_same(pipelines.run(pipeline), half)
    pipeline.set_adapters("ink", 1.0)
    assert_same(pipelines.run(pipeline), expected)


def test_a_kind_that_cannot_cross_is_refused_by_name_and_stays(rig: Rig) -> None:
    pipeline = rig.whole()
    pipeline.transformer.add_adapter(IA3Config(target_modules=["to_q"], feedforward_modules=[]), "scales")
    expected = pipelines.run(pipeline)
    with pytest.raises(UnsupportedInput, match="scales, of PEFT's kind IA3"):
        rig.split(pipeline)
    assert torch.equal(pipelines.run(pipeline), expected) and "scales" in pipeline.transformer.peft_config


@pytest.mark.parametrize("how", ["loras=", "load_lora_weights"])
@pytest.mark.parametrize("kind", ["rank-stabilised", "patterns"])
def test_the_scaling_in_a_files_metadata(rig: Rig, tmp_path: Path, kind: str, how: str) -> None:
    whole = rig.whole()
    torch.manual_seed(1)
    whole.transformer.add_adapter(CONFIGS[kind], "ink")
    whole.transformer.save_lora_adapter(tmp_path, "ink")
    state = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    note = {f"transformer.{k}": v for k, v in CONFIGS[kind].to_dict().items()}
    file = loras.save(
        tmp_path / "ink.safetensors",
        {f"transformer.{k}": v for k, v in state.items()},
        lora_adapter_metadata=json.dumps(note, default=sorted),
    )
    split = rig.split(loras=[file] if how == "loras=" else None)
    if how != "loras=":
        split.load_lora_weights(str(file))
    assert_same(pipelines.run(split), pipelines.run(whole))
    mesh_core.unsplit(split)


@pytest.mark.parametrize("pattern", ["(a+)+", ".*.*.*.*", "(", "x" * 300 + "*"])
def test_a_pattern_that_cannot_be_matched_in_time_is_refused(rig: Rig, tmp_path: Path, pattern: str) -> None:
    note = json.dumps({"transformer.lora_alpha": 4, "transformer.alpha_pattern": {pattern: 2}})
    state = loras.peft(loras.modules(rig.whole().transformer, "to_q"))
    file = loras.save(tmp_path / "slow.safetensors", state, lora_adapter_metadata=note)
    with pytest.raises(LoraError, match="alpha_pattern"):
        rig.split(loras=[file])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_files_of_8_bits(rig: Rig, tmp_path: Path, dtype: torch.dtype) -> None:
    state = loras.peft(loras.modules(rig.whole().transformer, *MODULES))
    file = loras.save(tmp_path / "small.safetensors", {k: v.to(dtype) for k, v in state.items()})
    whole, split = rig.whole(), rig.split(loras=[file])
    whole.load_lora_weights(str(file))
    assert_same(pipelines.run(split), pipelines.run(whole))
    mesh_core.set_loras(split, [])
    split.load_lora_weights(str(file))
    assert_same(pipelines.run(split), pipelines.run(whole))
    broken = {k: torch.full_like(v, float("nan")).to(dtype) for k, v in state.items()}
    with pytest.raises(LoraError, match="not finite"):
        mesh_core.set_loras(split, [loras.save(tmp_path / "broken.safetensors", broken)])
    mesh_core.unsplit(split)


def test_long_names_of_files(rig: Rig, tmp_path: Path) -> None:
    shapes = loras.modules(rig.whole().transformer, *MODULES)
    files = [loras.save(tmp_path / f"{'x' * 220}{i}.safetensors", loras.peft(shapes, seed=i)) for i in (1, 99)]
    split, whole = rig.split(loras=files), rig.whole()
    for i, file in enumerate(files):
        whole.load_lora_weights(str(file), adapter_name=str(i))
    whole.set_adapters(["0", "1"])
    assert_same(pipelines.run(split), pipelines.run(whole))
    assert len(stats(split).loras) == 2
    mesh_core.unsplit(split)


def test_a_path_at_which_there_is_nothing_is_called_that(rig: Rig, tmp_path: Path) -> None:
    split = rig.split()
    for missing, words in (
        (tmp_path / "no.safetensors", "no file"),
        (str(tmp_path / "no.safetensors"), "no file"),
        ("./no.safetensors", "no file"),
        (tmp_path, "is a folder"),
        ("loras/no.safetensors", "no file 'loras/no.safetensors'"),
    ):
        with pytest.raises(LoraMissing, match=words):
            mesh_core.set_loras(split, [missing])
    mesh_core.unsplit(split)


def test_a_naming_that_diffusers_does_not_read_names_the_way(rig: Rig, tmp_path: Path) -> None:
    state = {"double_blocks.0.img_attn.proj.lora_A.weight": torch.ones(2, 64)}
    state["double_blocks.0.img_attn.proj.lora_B.weight"] = torch.ones(64, 2)
    file = loras.save(tmp_path / "plain.safetensors", state)
    split = rig.split()
    with pytest.raises(LoraUnmatched, match=r"plain\.safetensors holds nothing") as caught:
        split.load_lora_weights(str(file))
    assert "loras=" in caught.value.hint and "namings that diffusers does not" in caught.value.hint
    mesh_core.set_loras(split, [file])
    mesh_core.unsplit(split)


def test_the_last_modulation_in_black_forest_labs_naming(rig: Rig, tmp_path: Path) -> None:
    """Shift and scale are the other way round in that naming: diffusers swaps them when it reads a checkpoint, and not
    when it reads a LoRA. The right picture is that of the LoRA merged into the checkpoint in that naming.
    """
    whole = rig.whole()
    linear = whole.transformer.norm_out.linear
    rows, columns = linear.weight.shape
    down, up = loras.randn(3, columns, seed=1), loras.randn(rows, 3, seed=2)
    original = torch.cat(linear.weight.chunk(2)[::-1]) + up @ down
    named = {"final_layer.adaLN_modulation.1.weight": original}
    linear.weight.data = convert_flux2_transformer_checkpoint_to_diffusers(named)["norm_out.linear.weight"]
    expected = pipelines.run(whole)
    state = {
        "diffusion_model.final_layer.adaLN_modulation.1.lora_A.weight": down,
        "diffusion_model.final_layer.adaLN_modulation.1.lora_B.weight": up,
    }
    file = loras.save(tmp_path / "last.safetensors", state)
    split = rig.split(loras=[file])
    assert_same(pipelines.run(split), expected)
    mesh_core.set_loras(split, [])
    split.load_lora_weights(str(file))
    as_diffusers = rig.whole()
    as_diffusers.load_lora_weights(str(file))
    assert_same(pipelines.run(split), pipelines.run(as_diffusers))
    assert (pipelines.run(split) - expected).abs().max() > 1e-3
    mesh_core.unsplit(split)
