"""Diffusers' LoRA calls on a split pipeline do what they do on a whole one; so do the mesh's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline
from safetensors.torch import load_file

import mesh_core
from mesh_core.builtin import load_plugins
from mesh_core.errors import LoraMissing, LoraUnmatched, PlanError
from mesh_core.host.session import Session
from mesh_core.model import fingerprint
from mesh_core.model.weights import WeightReader
from mesh_core.plugins.registry import Plugins
from mesh_core.programs.diffusers import stats
from tests.support import loras, pipelines
from tests.support.workers import ThreadWorker, mesh_home, thread_workers

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")


@dataclass
class Rig:
    folder: Path
    plugins: Plugins
    workers: list[ThreadWorker]

    def whole(self) -> Any:
        return Flux2KleinPipeline.from_pretrained(self.folder / "klein", dtype=torch.float32)

    def split(self, pipeline: Any, local: str = ":2", **options: Any) -> Any:
        addresses = [w.address for w in self.workers]
        return mesh_core.split(pipeline, local=local, workers=addresses, plugins=self.plugins, **options)

    def lora(self, name: str) -> str:
        return str(self.folder / "loras" / f"{name}.safetensors")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder, plugins = tmp_path_factory.mktemp("models"), load_plugins()
    pipelines.save(folder / "klein", dtype=torch.float32)
    model = Flux2KleinPipeline.from_pretrained(folder / "klein", dtype=torch.float32).transformer
    shapes = loras.modules(model, "to_q", "to_out.0", "linear_in", "to_qkv_mlp_proj", "x_embedder", "proj_out")
    loras.save(folder / "loras" / "ink.safetensors", loras.peft(shapes))
    loras.save(folder / "loras" / "chalk.safetensors", loras.peft(shapes, rank=5, seed=50))
    with mesh_home(tmp_path_factory.mktemp("home")):
        with thread_workers(folder / "klein", 2, "inproc", plugins=plugins) as workers:
            yield Rig(folder, plugins, workers)


Step = tuple[str, Callable[[Any, Rig], None]]
STORY: list[Step] = [
    ("load", lambda p, r: p.load_lora_weights(r.lora("ink"), adapter_name="ink")),
    ("weaken", lambda p, r: p.set_adapters(["ink"], [0.4])),
    ("load another", lambda p, r: p.load_lora_weights(r.lora("chalk"), adapter_name="chalk")),
    ("both", lambda p, r: p.set_adapters(["ink", "chalk"], [0.7, -0.5])),
    ("disable", lambda p, r: p.disable_lora()),
    ("enable", lambda p, r: p.enable_lora()),
    ("fuse", lambda p, r: p.fuse_lora(components=["transformer"], lora_scale=0.5)),
    ("unfuse", lambda p, r: p.unfuse_lora(components=["transformer"])),
    ("delete", lambda p, r: p.delete_adapters("ink")),
    ("alone", lambda p, r: p.set_adapters("chalk", 0.9)),
    ("fuse one", lambda p, r: p.fuse_lora(components=["transformer"])),
    ("unload what is fused", lambda p, r: p.unload_lora_weights()),
    ("load on top", lambda p, r: p.load_lora_weights(r.lora("ink"))),
    ("unload", lambda p, r: p.unload_lora_weights()),
]


def facts(pipeline: Any) -> tuple[object, ...]:
    return pipeline.get_list_adapters(), pipeline.get_active_adapters(), sorted(pipeline.fused_loras)


def test_every_call_of_diffusers_does_what_it_does_on_a_whole_pipeline(rig: Rig) -> None:
    whole, split = rig.whole(), rig.split(rig.whole())
    seen = [pipelines.run(whole)]
    for name, act in STORY:
        act(whole, rig)
        act(split, rig)
        expected, found = pipelines.run(whole), pipelines.run(split)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
        if name != "unload what is fused":
            assert facts(split)[:2] == facts(whole)[:2], name
        if name in ("load", "weaken", "load another", "both", "disable", "fuse", "load on top"):
            assert (expected - seen[-1]).abs().max() > 1e-3, f"{name} changes nothing: the test would prove nothing"
        seen.append(expected)
    mesh_core.unsplit(split)


def test_adapters_survive_splitting_cutting_anew_and_unsplitting(rig: Rig) -> None:
    pipeline, plain = rig.whole(), pipelines.run(rig.whole())
    pipeline.load_lora_weights(rig.lora("ink"), adapter_name="ink")
    pipeline.load_lora_weights(rig.lora("chalk"), adapter_name="chalk")
    pipeline.set_adapters(["chalk", "ink"], [0.3, 0.8])
    expected = pipelines.run(pipeline)
    assert (expected - plain).abs().max() > 1e-2

    def check(wanted: torch.Tensor) -> None:
        torch.testing.assert_close(pipelines.run(pipeline), wanted, rtol=1e-4, atol=2e-5)

    for local in (":0", ":3", ":"):
        rig.split(pipeline, local)
        check(expected)
    mesh_core.unsplit(pipeline)
    check(expected)
    assert pipeline.get_list_adapters() == {"transformer": ["ink", "chalk"]}
    pipeline.unload_lora_weights()
    assert torch.equal(pipelines.run(pipeline), plain)


def test_a_split_that_fails_leaves_the_adapters(rig: Rig) -> None:
    pipeline = rig.whole()
    pipeline.load_lora_weights(rig.lora("ink"), adapter_name="ink")
    pipeline.set_adapters("ink", 0.6)
    expected = pipelines.run(pipeline)
    with pytest.raises(PlanError):
        mesh_core.split(pipeline, local=":9", workers=[rig.workers[0].address], plugins=rig.plugins)
    torch.testing.assert_close(pipelines.run(pipeline), expected, rtol=1e-4, atol=2e-5)


def test_loras_of_load_pipeline_and_set_loras(rig: Rig) -> None:
    pipeline = mesh_core.load_pipeline(
        rig.folder / "klein",
        local=":1",
        workers=[w.address for w in rig.workers],
        plugins=rig.plugins,
        device="cpu",
        loras=[(rig.lora("ink"), 0.6)],
    )
    reference = rig.whole()
    reference.load_lora_weights(rig.lora("ink"), adapter_name="ink")
    reference.set_adapters("ink", 0.6)
    torch.testing.assert_close(pipelines.run(pipeline), pipelines.run(reference), rtol=1e-4, atol=2e-5)
    assert {p["action"] for p in stats(pipeline).loras} <= {"send", "reference"} and stats(pipeline).loras
    mesh_core.set_loras(pipeline, [(rig.lora("ink"), 0.1)])
    reference.set_adapters("ink", 0.1)
    torch.testing.assert_close(pipelines.run(pipeline), pipelines.run(reference), rtol=1e-4, atol=2e-5)
    mesh_core.set_loras(pipeline, [])
    reference.unload_lora_weights()
    assert torch.equal(pipelines.run(pipeline), pipelines.run(reference))
    mesh_core.unsplit(pipeline)


def test_a_lora_that_cannot_be_used_leaves_those_that_are(rig: Rig, tmp_path: Path) -> None:
    pipeline = rig.split(rig.whole(), loras=[rig.lora("ink")])
    expected = pipelines.run(pipeline)
    with pytest.raises(LoraMissing, match="no LoRA 'turbo'"):
        mesh_core.set_loras(pipeline, [("turbo", 1.0)])
    other = loras.save(tmp_path / "other.safetensors", {"unet.down.lora_A.weight": torch.ones(2, 2)})
    with pytest.raises(LoraUnmatched):
        mesh_core.set_loras(pipeline, [str(other)])
    broken = loras.peft({"x_embedder": (64, 16)}) | {
        "transformer.x_embedder.lora_B.weight": torch.full((64, 3), float("nan"))
    }
    with pytest.raises(mesh_core.LoraError):
        mesh_core.set_loras(pipeline, [str(loras.save(tmp_path / "broken.safetensors", broken))])
    assert torch.equal(pipelines.run(pipeline), expected)
    mesh_core.unsplit(pipeline)


@pytest.mark.parametrize("module", ["text_encoder.layers.0.q_proj", "transformer.down.0"])
def test_a_lora_for_something_else_is_named_by_its_file_and_not_by_a_slot(
    rig: Rig, tmp_path: Path, module: str
) -> None:
    file = loras.save(tmp_path / "style.safetensors", loras.peft({module: (8, 8)}, prefix=""))
    split = rig.split(rig.whole())
    given: list[tuple[Any, dict[str, str]]] = [
        (str(file), {}),
        (tmp_path, {"weight_name": "style.safetensors", "adapter_name": "mine"}),
        (load_file(file), {}),
    ]
    for source, options in given:
        with pytest.raises(LoraUnmatched) as caught:
            split.load_lora_weights(source, **options)
        message = caught.value.message
        assert ("a LoRA without a name" if isinstance(source, dict) else str(file)) in message and module in message
        assert "default_0" not in message and "made for klein" in caught.value.hint
    mesh_core.unsplit(split)


@pytest.mark.parametrize("local", [":", ":1", None])
def test_a_misspelt_lora_is_refused_before_anything_is_loaded(
    rig: Rig, local: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rig.whole()
    for owner, name in ((WeightReader, "fill"), (fingerprint, "of_checkpoint"), (Session, "open")):
        monkeypatch.setattr(owner, name, _never)
    # Who has blocks to run here for certain asks nobody before.
    workers = [w.address for w in rig.workers] if local is None else ["inproc://nobody"]
    options: Any = {"local": local, "workers": workers, "plugins": rig.plugins, "loras": ["turbo"]}
    with pytest.raises(LoraMissing, match="no LoRA 'turbo'"):
        mesh_core.load_pipeline(rig.folder / "klein", device="cpu", **options)
    with pytest.raises(LoraMissing, match="no LoRA 'turbo'"):
        mesh_core.split(whole, **options)
    assert not hasattr(whole.transformer, "mesh")


def _never(*_: object, **__: object) -> None:
    raise AssertionError("something was loaded")


def test_fused_adapters_cannot_be_split_off(rig: Rig) -> None:
    pipeline = rig.whole()
    pipeline.load_lora_weights(rig.lora("ink"), adapter_name="ink")
    pipeline.fuse_lora(components=["transformer"])
    with pytest.raises(PlanError, match="fused"):
        rig.split(pipeline)
