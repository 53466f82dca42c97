"""Every public LoRA method of pipelines and their transformers: on a split one it works, or is refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline
from diffusers.loaders import Flux2LoraLoaderMixin, LTX2LoraLoaderMixin
from diffusers.loaders.peft import PeftAdapterMixin
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

import mesh_core
from mesh_core.builtin import load_plugins
from mesh_core.errors import UnsupportedInput
from mesh_core.plugins.registry import Plugins
from tests.support import loras, pipelines
from tests.support.workers import mesh_home, thread_workers

WORKS, REFUSED, OFF = "works", "refused", "knows no transformer"

OF_PIPELINES = {
    "connectors_name": OFF,
    "delete_adapters": WORKS,
    "disable_lora": WORKS,
    "enable_lora": WORKS,
    "enable_lora_hotswap": REFUSED,
    "fuse_lora": WORKS,
    "fused_loras": WORKS,
    "get_active_adapters": WORKS,
    "get_list_adapters": WORKS,
    "load_lora_into_transformer": WORKS,
    "load_lora_weights": WORKS,
    "lora_scale": OFF,
    "lora_state_dict": OFF,
    "num_fused_loras": WORKS,
    "pack_weights": OFF,
    "save_lora_weights": OFF,
    "set_adapters": WORKS,
    "set_lora_device": WORKS,
    "transformer_name": OFF,
    "unfuse_lora": WORKS,
    "unload_lora_weights": WORKS,
    "write_lora_layers": OFF,
}
OF_TRANSFORMERS = {
    "active_adapters": WORKS,
    "add_adapter": REFUSED,
    "delete_adapters": WORKS,
    "disable_adapters": WORKS,
    "disable_lora": WORKS,
    "enable_adapters": WORKS,
    "enable_lora": WORKS,
    "enable_lora_hotswap": REFUSED,
    "fuse_lora": WORKS,
    "load_lora_adapter": WORKS,
    "save_lora_adapter": WORKS,
    "set_adapter": WORKS,
    "set_adapters": WORKS,
    "unfuse_lora": WORKS,
    "unload_lora": WORKS,
}


def _public(*classes: type) -> set[str]:
    return {name for cls in classes for name in dir(cls) if not name.startswith("_")}


def test_every_method_is_in_a_table() -> None:
    assert _public(Flux2LoraLoaderMixin, LTX2LoraLoaderMixin) == OF_PIPELINES.keys()
    assert _public(PeftAdapterMixin) == OF_TRANSFORMERS.keys()
    tried = {name for _, name in [*CALLS, *REFUSALS]}
    assert tried == {name for table in (OF_PIPELINES, OF_TRANSFORMERS) for name, how in table.items() if how != OFF}


class Pair:
    """A whole pipeline and a split one with the same weights and LoRAs."""

    def __init__(self, folder: Path, addresses: list[str], plugins: Plugins) -> None:
        self.ink, self.chalk = (str(folder / f"{name}.safetensors") for name in ("ink", "chalk"))
        self.whole, self.split = (Flux2KleinPipeline.from_pretrained(folder / "klein") for _ in range(2))
        for pipeline in (self.whole, self.split):
            pipeline.load_lora_weights(self.ink, adapter_name="ink")
            pipeline.load_lora_weights(self.chalk, adapter_name="chalk")
        mesh_core.split(self.split, local=":2", workers=addresses, plugins=plugins)

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        return pipelines.run(self.split), pipelines.run(self.whole)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str], Plugins]]:
    folder, plugins = tmp_path_factory.mktemp("models"), load_plugins()
    pipelines.save(folder / "klein", dtype=torch.float32)
    model = Flux2KleinPipeline.from_pretrained(folder / "klein").transformer
    loras.save(folder / "ink.safetensors", loras.peft(loras.modules(model, "to_q", "to_out", "x_embedder")))
    loras.save(folder / "chalk.safetensors", loras.peft(loras.modules(model, "to_q", "proj_out"), rank=5, seed=50))
    with mesh_home(tmp_path_factory.mktemp("home")):
        with thread_workers(folder / "klein", 1, "inproc", plugins=plugins) as workers:
            yield folder, [w.address for w in workers], plugins


@pytest.fixture
def pair(models: tuple[Path, list[str], Plugins]) -> Iterator[Pair]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Pair(*models)
        yield found
        mesh_core.unsplit(found.split)


def _fused(model: Any) -> Any:
    model.fuse_lora(adapter_names=["ink"])
    return model


CALLS: dict[tuple[str, str], Any] = {
    ("pipeline", "delete_adapters"): lambda p, r: p.delete_adapters("chalk"),
    ("pipeline", "disable_lora"): lambda p, r: p.disable_lora(),
    ("pipeline", "enable_lora"): lambda p, r: (p.disable_lora(), p.enable_lora()),
    ("pipeline", "fuse_lora"): lambda p, r: p.fuse_lora(lora_scale=0.5, adapter_names=["ink"]),
    ("pipeline", "fused_loras"): lambda p, r: _fused(p).fused_loras,
    ("pipeline", "get_active_adapters"): lambda p, r: p.get_active_adapters(),
    ("pipeline", "get_list_adapters"): lambda p, r: p.get_list_adapters(),
    ("pipeline", "load_lora_into_transformer"): lambda p, r: p.load_lora_into_transformer(
        load_file(r.ink), p.transformer, adapter_name="third"
    ),
    ("pipeline", "load_lora_weights"): lambda p, r: p.load_lora_weights(r.chalk),
    ("pipeline", "num_fused_loras"): lambda p, r: _fused(p).num_fused_loras,
    ("pipeline", "set_adapters"): lambda p, r: p.set_adapters(
        ["ink", "chalk"], [0.4, {"transformer": {"single_transformer_blocks": 0.3, "blocks": 0.1, "": 0.7}}]
    ),
    ("pipeline", "set_lora_device"): lambda p, r: p.set_lora_device(["ink"], "cpu"),
    ("pipeline", "unfuse_lora"): lambda p, r: (_fused(p).unfuse_lora(), p.num_fused_loras),
    ("pipeline", "unload_lora_weights"): lambda p, r: p.unload_lora_weights(),
    ("transformer", "active_adapters"): lambda p, r: p.transformer.active_adapters(),
    ("transformer", "delete_adapters"): lambda p, r: p.transformer.delete_adapters(["ink", "chalk", "none"]),
    ("transformer", "disable_adapters"): lambda p, r: p.transformer.disable_adapters(),
    ("transformer", "disable_lora"): lambda p, r: p.transformer.disable_lora(),
    ("transformer", "enable_adapters"): lambda p, r: (
        p.transformer.disable_adapters(),
        p.transformer.enable_adapters(),
    ),
    ("transformer", "enable_lora"): lambda p, r: (p.transformer.disable_lora(), p.transformer.enable_lora()),
    ("transformer", "fuse_lora"): lambda p, r: p.transformer.fuse_lora(0.5, safe_fusing=True),
    ("transformer", "load_lora_adapter"): lambda p, r: p.transformer.load_lora_adapter(r.ink, adapter_name="third"),
    ("transformer", "save_lora_adapter"): lambda p, r: _saved(p.transformer, r),
    ("transformer", "set_adapter"): lambda p, r: p.transformer.set_adapter("ink"),
    ("transformer", "set_adapters"): lambda p, r: p.transformer.set_adapters(["ink", "chalk"], [0.2, None]),
    ("transformer", "unfuse_lora"): lambda p, r: _fused(p.transformer).unfuse_lora(),
    ("transformer", "unload_lora"): lambda p, r: p.transformer.unload_lora(),
}


def _saved(transformer: Any, pair: Pair) -> Any:
    folder = Path(pair.ink).parent / f"saved-{type(transformer).__mro__[1].__name__}"
    transformer.save_lora_adapter(folder, "chalk")
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        said = file.metadata()["lora_adapter_metadata"]
    state = load_file(folder / "pytorch_lora_weights.safetensors")
    return {key: tensor.tolist() for key, tensor in state.items()}, {*said.replace(",", " ").split()}


@pytest.mark.parametrize(("owner", "name"), CALLS)
def test_what_works_does_what_it_does_on_a_whole_pipeline(pair: Pair, owner: str, name: str) -> None:
    act = CALLS[owner, name]
    assert act(pair.split, pair) == act(pair.whole, pair)
    torch.testing.assert_close(*pair.outputs(), rtol=1e-4, atol=2e-5)
    for question in ("get_active_adapters", "get_list_adapters"):
        assert getattr(pair.split, question)() == getattr(pair.whole, question)()
    assert pair.split.fused_loras == pair.whole.fused_loras
    mesh_core.unsplit(pair.split)
    torch.testing.assert_close(*pair.outputs(), rtol=1e-4, atol=2e-5)
    assert pair.split.get_active_adapters() == pair.whole.get_active_adapters()


REFUSALS: dict[tuple[str, str], Any] = {
    ("pipeline", "enable_lora_hotswap"): lambda p: p.enable_lora_hotswap(target_rank=8),
    ("transformer", "enable_lora_hotswap"): lambda p: p.transformer.enable_lora_hotswap(target_rank=8),
    ("transformer", "add_adapter"): lambda p: p.transformer.add_adapter(LoraConfig(target_modules=["to_q"]), "new"),
}


@pytest.mark.parametrize(("owner", "name"), REFUSALS)
def test_what_is_refused_is_refused_before_anything_changes(pair: Pair, owner: str, name: str) -> None:
    before = pipelines.run(pair.split)
    with pytest.raises(UnsupportedInput, match="split model"):
        REFUSALS[owner, name](pair.split)
    assert torch.equal(pipelines.run(pair.split), before)
    assert pair.split.get_list_adapters() == {"transformer": ["ink", "chalk"]}
