"""The benchmark for GPUs, on a machine that has none: its arithmetic on CPU tensors and stand-ins, and its refusal."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mesh_codec.hevc.nvvideo import NvVideoEngine
from mesh_core.bench import codec_device
from mesh_core.bench.codec_device import EngineTiming, states, table
from mesh_core.errors import ConfigError

from .emulated_ans import EmulatedAns
from .fake_nvvideo import FakeNvVideo

CPU = torch.device("cpu")
BENCH = [sys.executable, "-m", "mesh_core.cli", "bench", "codec", "--device", "cuda"]


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(codec_device, "NvComp", EmulatedAns)
    monkeypatch.setattr(codec_device, "NvVideoEngine", lambda: NvVideoEngine(FakeNvVideo(), CPU))
    monkeypatch.setattr(codec_device, "_events", lambda work: (1.0, work()))
    monkeypatch.setattr(codec_device, "_peak", lambda work, device: (100, work()))
    monkeypatch.setattr(codec_device, "_QPS", (18,))


def rows(shape: tuple[int, int]) -> list[EngineTiming]:
    tensors = states(shape, CPU)
    found = list(codec_device._entropy_rows(shape, tensors, CPU))
    return found + list(codec_device._video_rows(shape, tensors, CPU))


def test_every_engine_has_its_row(stand_ins):
    found = {row.codec: row for row in rows((256, 64))}
    assert len(found) == 9
    exact = [found[f"lossless, {engine}"] for engine in ("nvCOMP ANS", "portable")]
    assert all(row.error == 0 and 8 < row.bits < 12 for row in exact)
    single, predicted = found["entropy, nvCOMP ANS"], found["entropy + temporal, nvCOMP ANS"]
    assert predicted.bits < 0.8 * single.bits
    for row in found.values():
        assert row.decode_ms == 1.0
        assert row in exact or (0 < row.error < 0.3 and 0 < row.bits < 8)
        assert ("bit for bit as FFmpeg" in row.note) == ("libx265" in row.codec)
    assert table(list(found.values())).count("\n") == 10


def test_pictures_that_differ_are_said(stand_ins, monkeypatch):
    monkeypatch.setattr(codec_device, "NvVideoEngine", lambda: NvVideoEngine(FakeNvVideo(off_by=1), CPU))
    notes = [row.note for row in rows((256, 64)) if "libx265" in row.codec]
    assert notes and all("NOT AS FFMPEG" in note for note in notes)


def test_without_cuda_it_says_so_and_fails():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="NVIDIA"):
        next(codec_device.run(torch.device("cuda")))
    done = subprocess.run(BENCH, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "'cuda' cannot be used" in done.stderr and not done.stdout
