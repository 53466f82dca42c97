"""Diffusers' LoRA calls on a split pipeline whose weights are stored give what PEFT's layers around them give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import mesh_core
from mesh_core.errors import UnsupportedInput
from mesh_core.model.stored_weight import StoredWeight
from mesh_core.plugins.registry import Plugins
from tests.adapters import tiny
from tests.support import eight_bits, loras, pipelines
from tests.support.workers import thread_workers


@dataclass
class Rig:
    folder: Path
    plugins: Plugins
    address: str
    file: Path

    def load(self, local: str) -> Any:
        workers = [] if local == ":" else [self.address]
        return mesh_core.load_pipeline(self.folder, local=local, workers=workers, device="cpu", plugins=self.plugins)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("stored")
    pipelines.save(folder / "klein")
    weights = folder / "klein" / "transformer" / "diffusion_pytorch_model.safetensors"
    eight_bits.store(weights, lambda name: "blocks" in name)
    held = {n: s for n, s in loras.modules(tiny.transformer(guidance=False)).items() if "blocks" in n}
    # What PEFT puts around layers with numbers of bfloat16 is cast to that.
    state = {key: tensor.bfloat16() for key, tensor in loras.peft(held).items()}
    file, plugins = loras.save(folder / "ink.safetensors", state), eight_bits.plugins()
    with thread_workers(folder / "klein", 1, plugins=plugins) as (worker,):
        yield Rig(folder / "klein", plugins, worker.address, file)


def parameters(pipe: Any) -> list[Any]:
    return [p for n, p in pipe.transformer.named_parameters() if n.endswith("attn.to_q.weight") and not p.is_meta]


def test_a_split_pipeline_makes_the_picture_of_a_whole_one_with_peft(rig: Rig) -> None:
    whole = mesh_core.unsplit(rig.load(":"))
    plain = pipelines.run(whole)
    whole.load_lora_weights(str(rig.file), adapter_name="ink")
    expected = {}
    for strength in (1.0, 0.4):
        whole.set_adapters(["ink"], [strength])
        expected[strength] = pipelines.run(whole)
    assert not torch.equal(expected[1.0], plain) and not torch.equal(expected[0.4], expected[1.0])

    pipe = rig.load(":1")
    assert torch.equal(pipelines.run(pipe), plain)
    pipe.load_lora_weights(str(rig.file), adapter_name="ink")
    assert torch.equal(pipelines.run(pipe), expected[1.0])
    pipe.set_adapters(["ink"], [0.4])
    assert torch.equal(pipelines.run(pipe), expected[0.4])
    assert all(isinstance(p, StoredWeight) and p.change is not None for p in parameters(pipe))
    # Cut anew, and put together again: weights are compared with their file, and the LoRAs are none of them.
    mesh_core.split(pipe, local=":3", workers=[rig.address], plugins=rig.plugins)
    assert torch.equal(pipelines.run(pipe), expected[0.4])
    mesh_core.unsplit(pipe)
    assert torch.equal(pipelines.run(pipe), expected[0.4])
    pipe.unload_lora_weights()
    assert torch.equal(pipelines.run(pipe), plain)


def test_the_weights_of_a_split_model_are_those_of_the_file(rig: Rig) -> None:
    pipe = rig.load(":2")
    before = pipe.transformer.state_dict()
    mesh_core.set_loras(pipe, [(str(rig.file), 0.7)])
    assert not torch.equal(pipelines.run(pipe), pipelines.run(rig.load(":2")))
    mesh_core.set_loras(pipe, [])
    after = pipe.transformer.state_dict()
    assert before.keys() == after.keys()
    stored = [name for name, value in after.items() if isinstance(value, StoredWeight)]
    assert len(stored) == 30 and all(after[n].change is None for n in stored)
    for name in stored:
        for role, part in after[name].parts.items():
            assert torch.equal(part, before[name].parts[role])


def test_what_is_fused_cannot_be_put_into_stored_weights_and_the_split_goes_on(rig: Rig) -> None:
    pipe = rig.load(":1")
    pipe.load_lora_weights(str(rig.file), adapter_name="ink")
    expected = pipelines.run(pipe)
    pipe.fuse_lora()
    assert torch.equal(pipelines.run(pipe), expected)
    with pytest.raises(
        UnsupportedInput, match=r"fused LoRAs cannot be merged into .*to_q\.weight, which stays as it is"
    ):
        mesh_core.unsplit(pipe)
    assert torch.equal(pipelines.run(pipe), expected)
    pipe.unfuse_lora()
    mesh_core.unsplit(pipe)
    assert torch.equal(pipelines.run(pipe), expected)
    with pytest.raises(UnsupportedInput, match="would change a weight that is stored"):
        pipe.fuse_lora()
