"""LTX-2 over real workers: remote equals local, and what crosses per step is two states and little else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel

from mesh_core import wire
from mesh_core.builtin import load_plugins
from mesh_core.host.remote import Remote
from mesh_core.host.runner import SplitRunner
from mesh_core.plugins.registry import Plugins
from tests.adapters import tiny_ltx
from tests.support.splitting import split
from tests.support.workers import ThreadWorker, thread_workers

HEADER_BYTES = 1600
"""What a step may spend on names: of tensors, codecs and constants."""

_TOKENS = tiny_ltx.FRAMES * tiny_ltx.HEIGHT * tiny_ltx.WIDTH


@dataclass
class Rig:
    path: Path
    model: LTX2VideoTransformer3DModel
    plugins: Plugins
    workers: list[ThreadWorker]

    def inputs(self) -> dict[str, Any]:
        given = tiny_ltx.inputs("2.3", batch=1, dtype=torch.bfloat16)
        return tiny_ltx.image_to_video(tiny_ltx.coordinates(self.model, given))

    def check(self, run: SplitRunner, given: dict[str, Any]) -> None:
        with torch.no_grad():
            expected = self.model(**given, return_dict=False)
        found = run(given)
        assert isinstance(found, tuple) and len(found) == 2
        assert all(torch.equal(e, f) for e, f in zip(expected, found, strict=True))


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    path = tmp_path_factory.mktemp("models") / "ltx"
    model = tiny_ltx.transformer("2.3", dtype=torch.bfloat16)
    model.save_pretrained(path)
    plugins = load_plugins()
    with thread_workers(path.parent, 2, "mesh", plugins=plugins) as workers:
        yield Rig(path, model, plugins, workers)


def later(given: dict[str, Any], factor: float) -> dict[str, Any]:
    """The next step of the same generation: other latents and times, everything else the very same tensors."""
    moved = {n: given[n] * factor for n in ("timestep", "audio_timestep", "sigma")}
    return {**given, **moved, "hidden_states": given["hidden_states"] * 0.9}


@pytest.mark.parametrize("local", [":0", ":1", ":2"])
def test_remote_equals_local(rig: Rig, local: str) -> None:
    given = rig.inputs()
    with split(rig.path, local, rig.workers, rig.plugins, dtype=torch.bfloat16) as run:
        for call in (given, {**given, "isolate_modalities": True}, {**given, "spatio_temporal_guidance_blocks": [1]}):
            rig.check(run, call)
            rig.check(run, later(call, 0.7))


@pytest.mark.parametrize("local", [0, 1])
def test_a_step_is_two_states_and_little_else(rig: Rig, local: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[int]] = []
    tell = Remote.tell

    def noting(self: Remote, message: wire.Message, buffers: Any = ()) -> None:
        if isinstance(message, wire.Step):
            sent.append([memoryview(f).nbytes for f in wire.pack(message, buffers)])
        tell(self, message, buffers)

    monkeypatch.setattr(Remote, "tell", noting)
    given = rig.inputs()
    widths = (8, 6) if local == 0 else (32, 16)
    with split(rig.path, f":{local}", rig.workers[:1], rig.plugins, dtype=torch.bfloat16, codec="raw") as run:
        for factor in (1.0, 0.8, 0.6):
            rig.check(run, later(given, factor))
        steps = run.stats.steps
    for header, *buffers in sent:
        assert buffers == [_TOKENS * widths[0] * 2, tiny_ltx.AUDIO_FRAMES * widths[1] * 2, 2 * 4]
        assert header < HEADER_BYTES
    assert [s.hops[0].out_coded for s in steps] == [(_TOKENS * 8 + tiny_ltx.AUDIO_FRAMES * 6) * 2] * 3


def test_constants_cross_once_per_generation(rig: Rig) -> None:
    given = rig.inputs()
    once = ("encoder_hidden_states", "audio_encoder_hidden_states", "encoder_attention_mask")
    coordinates = ("video_coords", "audio_coords")
    indices = _TOKENS + 1  # one for each video token; audio and both sigmas share one
    expected = sum(given[name].nbytes for name in (*once, *coordinates)) + indices
    with split(rig.path, ":1", rig.workers[:1], rig.plugins, dtype=torch.bfloat16) as run:
        for factor in (1.0, 0.8, 0.6, 0.4):
            rig.check(run, later(given, factor))
        assert run.stats.constants_bytes == expected


def test_video_and_audio_are_coded_with_settings_of_their_own(rig: Rig) -> None:
    """With streams that do not hear each other, the audio is the same whatever the video loses."""
    given = {**rig.inputs(), "isolate_modalities": True}
    with torch.no_grad():
        exact = rig.model(**given, return_dict=False)
    found = {}
    for quality in ("transparent", "fast"):
        coded = {"dtype": torch.bfloat16, "quality": quality, "codec": "entropy"}
        with split(rig.path, ":1", rig.workers[:1], rig.plugins, **coded) as run:  # type: ignore[arg-type]
            found[quality] = run(given)
    loss = {q: [(e - f).float().norm() for e, f in zip(exact, streams, strict=True)] for q, streams in found.items()}
    assert loss["fast"][0] > 2 * loss["transparent"][0] > 0
    assert torch.equal(found["fast"][1], found["transparent"][1]) and loss["fast"][1] > 0


@pytest.mark.parametrize(
    ("quality", "video", "audio"), [("transparent", 26, 26), ("balanced", 21, 26), ("fast", 16, 25)]
)
def test_each_quality_keeps_both_streams_above_a_ratio_of_signal_to_noise(
    rig: Rig, quality: Any, video: float, audio: float
) -> None:
    """In dB, of the predictions of several steps. The audio hears the video, so it follows a little."""
    given = rig.inputs()
    coded = {"dtype": torch.bfloat16, "quality": quality, "codec": "entropy"}
    with split(rig.path, ":1", rig.workers[:1], rig.plugins, **coded) as run, torch.no_grad():  # type: ignore[arg-type]
        for factor in (1.0, 0.8, 0.6, 0.4):
            step = later(given, factor)
            for least, e, f in zip((video, audio), rig.model(**step, return_dict=False), run(step), strict=True):
                noise = (e.float() - f.float()).square().mean()
                assert noise > 0 and 10 * torch.log10(e.float().square().mean() / noise) > least
