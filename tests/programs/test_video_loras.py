"""LoRAs over video, audio and what joins them: on a split video pipeline they do what they do on a whole one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTX2Pipeline
from safetensors.torch import load_file

import mesh_core
from mesh_core.builtin import load_plugins
from mesh_core.errors import LoraError, LoraUnmatched
from mesh_core.loras.part import Part
from mesh_core.loras.read import read_lora
from mesh_core.programs.diffusers import stats
from tests.adapters import tiny_ltx
from tests.support import loras, video_pipelines
from tests.support.splitting import checkpoint_at
from tests.support.workers import ProcessWorker, process_worker

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")

Output = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Rig:
    folder: Path
    worker: ProcessWorker
    shapes: dict[str, tuple[int, ...]]
    connectors: dict[str, tuple[int, ...]]

    def whole(self) -> Any:
        pipeline = LTX2Pipeline.from_pretrained(self.folder / "ltx", dtype=torch.float32)
        for parameter in pipeline.transformer.parameters():
            # Weights that are mapped from a file begin anywhere in memory; the order in which matrix libraries sum
            # depends on where.
            parameter.data = parameter.data.clone()
        return pipeline

    @contextmanager
    def split(self, pipeline: Any = None, local: str = ":1", **options: Any) -> Iterator[Any]:
        split = mesh_core.split(pipeline or self.whole(), local=local, workers=[self.worker.address], **options)
        try:
            yield split
        finally:
            mesh_core.unsplit(split)

    def files(self, seed: int) -> tuple[str, str]:
        """One LoRA of every linear layer, as diffusers names them and as ComfyUI does."""
        folder = self.folder.parent / "loras"
        ours = loras.save(folder / f"diffusers-{seed}.safetensors", loras.peft(self.shapes, seed=seed))
        bare = loras.peft(self.shapes, seed=seed, prefix="")
        theirs = {f"diffusion_model.{tiny_ltx.original_name(key)}": value for key, value in bare.items()}
        return str(ours), str(loras.save(folder / f"comfyui-{seed}.safetensors", theirs))


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("videos") / "models"
    pipeline = video_pipelines.pipeline(dtype=torch.float32)
    pipeline.save_pretrained(folder / "ltx")
    with process_worker(folder, "--device", "cpu") as worker:
        yield Rig(
            folder, worker, loras.modules(pipeline.transformer), loras.modules(pipeline.connectors, "text_proj_in")
        )


def run(pipeline: Any) -> Output:
    """The latents of video and audio: codecs that make frames and sound of them would hide what they are."""
    video, audio = video_pipelines.run(pipeline, output_type="latent")
    return video, audio


def assert_close(found: Output, expected: Output, what: str = "") -> None:
    for stream, a, b in zip(("video", "audio"), found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, s=stream: f"{what} {s}: {m}")


def assert_differ(one: Output, other: Output) -> None:
    for stream, a, b in zip(("video", "audio"), one, other, strict=True):
        assert (a - b).abs().max() > 1e-2, f"{stream} is the same: the test would prove nothing"


@pytest.mark.parametrize(("naming", "local"), [("diffusers", ":0"), ("comfyui", ":2")])
def test_calls_of_diffusers(rig: Rig, naming: str, local: str) -> None:
    file = rig.files(seed=1)[naming == "comfyui"]
    whole = rig.whole()
    seen = [run(whole)]
    with rig.split(local=local) as split:
        for act in (
            lambda p: p.load_lora_weights(file, adapter_name="ink"),
            lambda p: p.set_adapters(["ink"], [0.4]),
            lambda p: p.fuse_lora(components=["transformer"]),
            lambda p: p.unfuse_lora(components=["transformer"]),
        ):
            act(whole), act(split)
            seen.append(run(whole))
            assert_close(run(split), seen[-1])
        assert_differ(seen[0], seen[1])
        assert_differ(seen[1], seen[2])
        split.unload_lora_weights()
        assert all(torch.equal(a, b) for a, b in zip(run(split), seen[0], strict=True))


@pytest.mark.parametrize("how", ["before", "after", "loras="])
def test_a_bias_is_scaled_as_the_rest_is(rig: Rig, tmp_path: Path, how: str) -> None:
    state = loras.peft(rig.shapes, seed=3, prefix="")
    for i, (module, shape) in enumerate(rig.shapes.items()):
        state[f"{module}.lora_B.bias"] = loras.randn(shape[0], seed=500 + i)
    note = {"r": loras.RANK, "lora_alpha": 2 * loras.RANK, "target_modules": list(rig.shapes), "lora_bias": True}
    file = loras.save(
        tmp_path / "biases.safetensors",
        {f"transformer.{k}": v for k, v in state.items()},
        lora_adapter_metadata=json.dumps({f"transformer.{k}": v for k, v in note.items()}),
    )
    whole = rig.whole()
    plain = run(whole)
    whole.load_lora_weights(str(file), adapter_name="ink")
    expected = run(whole)
    assert_differ(expected, plain)
    with rig.split(whole if how == "before" else None, loras=[file] if how == "loras=" else None) as split:
        if how == "after":
            split.load_lora_weights(str(file), adapter_name="ink")
        assert_close(run(split), expected, how)
    if how != "loras=":
        assert_close(run(split), expected, "unsplit")


def test_a_lora_is_sent_once_whatever_its_strength_and_naming(rig: Rig) -> None:
    file, same = rig.files(seed=1000)
    checkpoint = checkpoint_at(rig.folder / "ltx", load_plugins())
    there = checkpoint.spec.parameters_of(checkpoint.spec.span("1:"))
    part = Part(read_lora(file, checkpoint).restricted(there))
    reference = rig.whole()
    reference.load_lora_weights(file, adapter_name="ink")
    with rig.split(loras=[(file, 0.9)]) as split:
        for strength in (0.9, 0.3):
            mesh_core.set_loras(split, [(file, strength)])
            reference.set_adapters("ink", strength)
            assert_close(run(split), run(reference))
            (placed,) = stats(split).loras
            assert placed["bytes_sent"] == part.nbytes, "once"
    with rig.split(loras=[(same, 0.3)]) as split:
        assert [(p["action"], p["bytes_sent"]) for p in stats(split).loras] == [("reference", 0)]
        assert_close(run(split), run(reference))


def test_a_lora_of_another_family_is_refused_by_name(rig: Rig, tmp_path: Path) -> None:
    shapes = {f"single_transformer_blocks.{i}.attn.to_out": (32, 32) for i in range(2)}
    other = str(loras.save(tmp_path / "klein.safetensors", loras.peft(shapes)))
    wide = str(loras.save(tmp_path / "wide.safetensors", loras.peft({**shapes, "proj_out": (128, 64)})))
    with rig.split(loras=[rig.files(seed=1)[0]]) as split:
        expected = run(split)
        for attempt in (lambda f: mesh_core.set_loras(split, [f]), split.load_lora_weights):
            with pytest.raises(LoraUnmatched, match=r"None of the 4 keys .* ltx model, .*single_transformer_blocks"):
                attempt(other)
            with pytest.raises(LoraError, match=r"does not fit proj_out\.weight"):
                attempt(wide)
        assert all(torch.equal(a, b) for a, b in zip(run(split), expected, strict=True))


def test_what_a_lora_changes_outside_the_transformer(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """Its layers between text encoder and transformer run on the host, where diffusers' calls leave them."""
    _, file = rig.files(seed=1)
    bare = loras.peft(rig.connectors, seed=7, prefix="")
    renamed = {f"text_embedding_projection.{k.replace('text_proj_in', 'aggregate_embed')}": v for k, v in bare.items()}
    assert len(renamed) == 4
    both = str(loras.save(Path(file).with_name("both.safetensors"), {**load_file(file), **renamed}))
    whole = rig.whole()
    whole.load_lora_weights(file)
    without = run(whole)
    whole.unload_lora_weights()
    whole.load_lora_weights(both, adapter_name="ink")
    expected = run(whole)
    assert_differ(expected, without)
    with rig.split(loras=[both]) as split:
        assert_close(run(split), without)
    assert "4 of the keys" in caplog.text and "text_embedding_projection" in caplog.text
    with rig.split() as late:
        late.load_lora_weights(both, adapter_name="ink")
        assert_close(run(late), expected, "split, then loaded")
    assert_close(run(late), expected, "unsplit")
    with rig.split(whole) as early:
        assert_close(run(early), expected, "loaded, then split")
    assert_close(run(whole), expected, "unsplit")
