"""A video pipeline with sound, cut over a worker process, gives the frames and the samples of the whole one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import LTX2ConditionPipeline, LTX2ImageToVideoPipeline, LTX2Pipeline, LTXVideoTransformer3DModel
from diffusers.models.attention_dispatch import attention_backend
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from PIL import Image

import mesh_core
from mesh_core.builtin import installed_plugins
from mesh_core.cli import FAILED, cli
from mesh_core.errors import CheckpointUnrecognised, ConfigError, UnsupportedInput
from mesh_core.model.weights import WeightReader
from mesh_core.programs import media
from mesh_core.programs.diffusers import stats
from mesh_core.programs.pipeline_folder import check_call
from tests.adapters import tiny_ltx
from tests.support import video_pipelines
from tests.support.workers import ProcessWorker, process_worker


@dataclass
class Rig:
    folder: Path
    worker: ProcessWorker
    whole: LTX2Pipeline

    @contextmanager
    def loaded(self, local: str) -> Iterator[Any]:
        pipeline = mesh_core.load_pipeline(self.folder, local=local, workers=[self.worker.address], device="cpu")
        try:
            yield pipeline
        finally:
            mesh_core.unsplit(pipeline)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    installed_plugins.cache_clear()
    folder = tmp_path_factory.mktemp("models") / "ltx"
    video_pipelines.save(folder)
    whole = LTX2Pipeline.from_pretrained(folder, dtype=torch.bfloat16)
    with process_worker(folder.parent, "--device", "cpu") as worker:
        yield Rig(folder, worker, whole)


def same(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("local", [":0", ":2"])
def test_video_and_sound_are_those_of_the_whole_pipeline(rig: Rig, local: str) -> None:
    expected = video_pipelines.run(rig.whole)
    with rig.loaded(local) as pipeline:
        assert same(video_pipelines.run(pipeline), expected)
        assert [len(s.hops) for s in stats(pipeline).steps] == [1] * 6, "two steps of three passes"
        assert same(video_pipelines.run(mesh_core.unsplit(pipeline)), expected)


def test_the_model_answers_in_its_own_type(rig: Rig) -> None:
    given = tiny_ltx.inputs("2.3", dtype=torch.bfloat16)
    with rig.loaded(":1") as pipeline, torch.no_grad():
        expected, found = rig.whole.transformer(**given), pipeline.transformer(**given)
    assert type(found) is type(expected)
    assert same((found.sample, found.audio_sample), (expected.sample, expected.audio_sample))


def test_image_to_video_and_conditions(rig: Rig) -> None:
    """The pipelines that give some tokens timesteps of their own."""
    picture = Image.new("RGB", (video_pipelines.WIDTH, video_pipelines.HEIGHT), (200, 30, 10))
    given = LTX2VideoCondition(frames=picture, index=0, strength=0.7, crf=0)
    calls = {
        LTX2ImageToVideoPipeline: {"image": picture, "image_crf": 0},
        LTX2ConditionPipeline: {"conditions": [given]},
    }
    for kind, call in calls.items():
        whole = kind(**rig.whole.components)
        expected = video_pipelines.run(whole, **call)
        mesh_core.split(whole, local=":1", workers=[rig.worker.address])
        try:
            assert same(video_pipelines.run(whole, **call), expected), kind.__name__
        finally:
            mesh_core.unsplit(whole)


def mesh(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def test_offloading_and_attention_backends_act_as_on_the_whole_pipeline(rig: Rig) -> None:
    with attention_backend("_native_math"):
        expected = video_pipelines.run(rig.whole)
        with rig.loaded(":1") as pipeline:
            pipeline.enable_model_cpu_offload(device="cpu")
            assert same(video_pipelines.run(pipeline), expected)
            assert stats(pipeline).steps
            with pytest.raises(UnsupportedInput):
                pipeline.transformer.transformer_blocks[1].attn1.register_forward_hook(print)


def generate(rig: Rig, *options: object) -> Result:
    size = ("--width", video_pipelines.WIDTH, "--height", video_pipelines.HEIGHT, "--frames", video_pipelines.FRAMES)
    return mesh("generate", rig.folder, "a fox", "--steps", "1", "--device", "cpu", *size, *options)


def decoded(file: Path) -> tuple[list[Any], np.ndarray, float]:
    """Frames, samples and frame rate."""
    with av.open(str(file)) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        rate = float(container.streams.video[0].average_rate or 0)
    with av.open(str(file)) as container:
        samples = np.concatenate([f.to_ndarray() for f in container.decode(audio=0)], axis=1)
    return frames, samples, rate


def test_generate_writes_a_video_with_sound(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is coded is equal to the last bit. The files need not be: x264's macroblock tree codes equal frames
    differently from time to time, in one thread too."""
    coded: list[media.Video] = []
    write = media.write_video
    monkeypatch.setattr(media, "write_video", lambda video, file: (coded.append(video), write(video, file)))
    results = {}
    for name, options in (("whole", ["--local", ":"]), ("split", ["--local", ":1", "--worker", rig.worker.address])):
        file = tmp_path / f"{name}.mp4"
        result = generate(rig, *options, "--fps", 25, "-o", file)
        assert result.exit_code == 0, (result.output, result.exception)
        assert f"saved {file}" in result.output
        results[name] = decoded(file)
    assert "worker" in result.output
    frames, samples, rate = results["split"]
    assert len(frames) == video_pipelines.FRAMES and rate == 25
    assert frames[0].shape == (video_pipelines.HEIGHT, video_pipelines.WIDTH, 3)
    seconds = video_pipelines.FRAMES / 25
    assert len(samples) == 2 and abs(samples.shape[1] / video_pipelines.SAMPLE_RATE - seconds) < 0.1
    assert samples.std() > 0.01, "there is something to hear"
    whole, split = coded
    assert np.array_equal(whole.frames, split.frames)
    assert whole.sound is not None and split.sound is not None
    assert np.array_equal(whole.sound.samples, split.sound.samples)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--frames", 10], "9 or 17"),
        (["--width", 100], "96"),
        (["--lora", "misspelt"], "no LoRA 'misspelt'"),
        (["-o", "fox.png"], "makes a video"),
        (["-o", "gone/fox.mp4"], "does not exist"),
    ],
    ids=str,
)
def test_what_the_pipeline_does_not_make_is_refused_before_any_weight_is_read(
    rig: Rig, options: list[object], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(WeightReader, "fill", _never)
    result = generate(rig, "--local", ":", *options)
    assert result.exit_code == FAILED and said in result.output


def test_a_pipeline_of_the_older_architecture_is_named_before_any_weight_is_read(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(WeightReader, "fill", _never)
    folder = tmp_path / "older"
    shutil.copytree(rig.folder, folder, ignore=shutil.ignore_patterns("transformer"))
    LTXVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_layers=2, caption_channels=12
    ).save_pretrained(folder / "transformer")
    with pytest.raises(CheckpointUnrecognised, match="can make no audio"):
        check_call(folder, {})
    assert "no audio" in mesh("generate", folder, "a fox").output


def _never(*_: object, **__: object) -> None:
    raise AssertionError("weights were read")


class _Silent:
    """A pipeline that makes frames as floating point arrays, and no sound."""

    components: dict[str, Any] = {}  # noqa: RUF012

    def __call__(self, num_frames: int = 3, fps: int = 8) -> None: ...


def test_frames_without_sound(tmp_path: Path) -> None:
    output = type("Output", (), {"frames": np.full((1, 3, 31, 33, 3), 0.5)})
    media.save(_Silent(), output, {}, tmp_path / "silent.mp4")
    with av.open(str(tmp_path / "silent.mp4")) as container:
        assert not container.streams.audio and container.streams.video[0].average_rate == 8
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(frames) == 3 and frames[0].shape == (30, 32, 3)
    assert abs(int(frames[0].mean()) - 128) < 3


def test_sound_of_an_unknown_rate_is_an_error_with_a_way_out() -> None:
    output = type("Output", (), {"frames": np.zeros((1, 1, 32, 32, 3)), "audio": torch.zeros(1, 2, 100)})
    with pytest.raises(ConfigError, match="output_sampling_rate"):
        media.video_of(_Silent(), output, {})
