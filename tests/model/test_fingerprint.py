"""A model's identity: the same for every layout of the same weights, another for any other bit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mesh_core.errors import CheckpointChanged
from mesh_core.model import fingerprint
from mesh_core.model.checkpoint import read_header
from mesh_core.system.config import cache_dir
from mesh_klein import KleinAdapter
from tests.adapters import tiny
from tests.support.workers import mesh_home

ADAPTER = KleinAdapter()
MODEL = tiny.transformer(guidance=False, doubles=1, singles=1)


@pytest.fixture(autouse=True)
def home(tmp_path: Path) -> object:
    with mesh_home(tmp_path / "home"):
        yield


def of(path: Path) -> str:
    header = read_header(path)
    spec = ADAPTER.recognise(header)
    assert spec is not None
    return fingerprint.of_checkpoint(header, spec)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "klein"
    MODEL.save_pretrained(path)
    return path


def test_all_layouts_and_the_model_in_memory_agree(folder: Path, tmp_path: Path) -> None:
    MODEL.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    tiny.save_single_file(MODEL, tmp_path / "fused.safetensors")
    tiny.save_single_file(MODEL, tmp_path / "comfy.safetensors", "model.diffusion_model.")
    save_file(dict(MODEL.state_dict()), tmp_path / "single.safetensors")
    paths = [
        folder,
        *(tmp_path / n for n in ("shards", "fused.safetensors", "comfy.safetensors", "single.safetensors")),
    ]
    found = {p.name: of(p) for p in paths}
    spec = ADAPTER.recognise(read_header(folder))
    assert spec is not None
    found["memory"] = fingerprint.of_model(spec, MODEL)
    assert len(set(found.values())) == 1, found


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_single_bit_of_any_weight_counts(folder: Path, data: st.DataObject, tmp_path: Path) -> None:
    original = of(folder)
    (source,) = folder.glob("*.safetensors")
    content = bytearray(source.read_bytes())
    start = min(t.offset for t in read_header(folder).tensors.values())
    position = data.draw(st.integers(start, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    copy = tmp_path / "copy"
    copy.mkdir(exist_ok=True)
    (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
    (copy / source.name).write_bytes(content)
    header = read_header(copy)
    spec = ADAPTER.recognise(header)
    assert spec is not None
    with mesh_home(tmp_path / "nothing remembered" / str(position)):
        assert fingerprint.of_checkpoint(header, spec) != original


def test_the_same_numbers_in_another_type_are_another_model(folder: Path, tmp_path: Path) -> None:
    tiny.transformer(guidance=False, doubles=1, singles=1, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    assert of(folder) != of(tmp_path / "bf16")


def test_two_weights_of_one_shape_exchanged_are_another_model(folder: Path, tmp_path: Path) -> None:
    state = dict(MODEL.state_dict())
    q, k = "transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_k.weight"
    state[q], state[k] = state[k].clone(), state[q].clone()
    save_file(state, tmp_path / "exchanged.safetensors")
    assert of(folder) != of(tmp_path / "exchanged.safetensors")


def hashed(path: Path) -> int:
    """Bytes of weights that a call for the fingerprint reads."""
    read = 0

    def progress(done: int, total: int) -> None:
        nonlocal read
        read = done
        assert done <= total

    header = read_header(path)
    spec = ADAPTER.recognise(header)
    assert spec is not None
    fingerprint.of_checkpoint(header, spec, progress)
    return read


def test_only_the_first_call_reads_the_weights(folder: Path) -> None:
    header = read_header(folder)
    spec = ADAPTER.recognise(header)
    assert spec is not None
    assert fingerprint.known(header, spec) is None
    assert hashed(folder) == sum(t.nbytes for t in header.tensors.values())
    assert hashed(folder) == 0
    assert fingerprint.known(header, spec) == of(folder)


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file(dict(MODEL.state_dict()), file)
    before = of(file)
    os.utime(file, ns=(1, 1))
    assert hashed(file) > 0 and of(file) == before
    other = tiny.transformer(guidance=False, doubles=1, singles=1, seed=9)
    save_file(dict(other.state_dict()), file)
    assert of(file) != before


@pytest.mark.parametrize("content", ["", "[]", "{", '{"state": 1}', '{"value": "short"}', "null"])
def test_a_damaged_note_is_ignored(folder: Path, content: str) -> None:
    expected = of(folder)
    (note,) = (cache_dir() / "fingerprints").iterdir()
    note.write_text(content)
    assert of(folder) == expected
    assert json.loads(note.read_text())["value"] == expected, "it is written anew"


def test_a_cache_that_cannot_be_written_costs_time_only(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = of(folder)
    home = cache_dir().parent
    with mesh_home(home.parent / "a file"):
        (home.parent / "a file").write_text("in the way")
        assert of(folder) == expected
        assert hashed(folder) > 0
    assert "not remembered" in caplog.text


def test_a_full_disk_costs_time_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert of(folder) and hashed(folder) > 0
    assert "No space left" in caplog.text
    assert list((cache_dir() / "fingerprints").iterdir()) == [], "nothing half written stays behind"


def test_a_checkpoint_that_shrinks_meanwhile_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file(dict(MODEL.state_dict()), file)
    header = read_header(file)
    spec = ADAPTER.recognise(header)
    assert spec is not None
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointChanged, match=r"m\.safetensors changed while it was in use"):
        fingerprint.of_checkpoint(header, spec)
