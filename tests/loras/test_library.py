"""A worker's LoRA folders: found by content and by name, never outside, and described for people."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from mesh_core.builtin import load_plugins
from mesh_core.errors import LoraMissing
from mesh_core.host.loras import Borrowed
from mesh_core.loras.library import LoraLibrary, own_library
from mesh_core.loras.lora import Applied
from mesh_core.loras.part import Part
from mesh_core.loras.read import read_lora
from mesh_core.loras.received import ReceivedLoras
from mesh_core.model.library import Checkpoint
from mesh_core.system.config import Settings
from tests.adapters import tiny
from tests.support import loras
from tests.support.splitting import split
from tests.support.workers import ThreadWorker, mesh_home


def save(path: Path, model: Checkpoint, seed: int = 0, **metadata: str) -> Path:
    shapes = {n.removesuffix(".weight"): p.shape for n, p in model.spec.parameters.items() if ".to_q." in n}
    return loras.save(path, loras.peft(shapes, seed=seed), **metadata)


@pytest.fixture
def folder(tmp_path: Path, model: Checkpoint) -> Path:
    save(tmp_path / "loras" / "turbo.safetensors", model, 1, ss_trigger_words="go fast")
    save(tmp_path / "loras" / "style" / "ink.safetensors", model, 2)
    save(tmp_path / "secret" / "hidden.safetensors", model, 3)
    (tmp_path / "loras" / "notes.txt").write_text("x")
    (tmp_path / "loras" / "torn.safetensors").write_bytes(b"torn")
    return tmp_path / "loras"


def test_the_listing_says_what_people_want_to_know_and_no_paths(
    folder: Path, tmp_path: Path, model: Checkpoint
) -> None:
    tags = json.dumps({"1_x": {"red": 3, "fox": 5}})
    save(folder / "fox.safetensors", model, 4, ss_tag_frequency=tags, ss_output_name="A fox")
    listed = {x["name"]: x for x in LoraLibrary(ReceivedLoras(tmp_path / "none", 0), [folder]).listing()}
    assert set(listed) == {"turbo.safetensors", "style/ink.safetensors", "fox.safetensors"}
    assert listed["turbo.safetensors"]["trigger"] == "go fast" and listed["fox.safetensors"]["trigger"] == "fox, red"
    assert listed["fox.safetensors"]["title"] == "A fox" and listed["turbo.safetensors"]["bytes"] > 0
    assert str(tmp_path) not in json.dumps(list(listed.values()))


def test_links_out_of_the_folder_are_not_followed(folder: Path, tmp_path: Path) -> None:
    try:
        (folder / "out.safetensors").symlink_to(tmp_path / "secret" / "hidden.safetensors")
        (folder / "dir").symlink_to(tmp_path / "secret", target_is_directory=True)
        (folder / "loop").symlink_to(folder, target_is_directory=True)
        (folder / "inside.safetensors").symlink_to(folder / "turbo.safetensors")
    except OSError:
        pytest.skip("this system lets no one make links")
    names = {x["name"] for x in LoraLibrary(ReceivedLoras(tmp_path / "none", 0), [folder]).listing()}
    assert names == {"turbo.safetensors", "style/ink.safetensors", "inside.safetensors"}


@pytest.mark.parametrize("name", ["turbo", "turbo.safetensors", "style/ink.safetensors", "ink"])
def test_names(folder: Path, tmp_path: Path, model: Checkpoint, name: str) -> None:
    found = LoraLibrary(ReceivedLoras(tmp_path / "none", 0), [folder]).named(name, model, model.spec.parameters)
    assert Path(found.name).stem in name or name in found.name


@pytest.mark.parametrize(
    "name", ["../secret/hidden.safetensors", "/etc/passwd", "", "loras/turbo.safetensors", "style"]
)
def test_names_that_are_none(folder: Path, tmp_path: Path, model: Checkpoint, name: str) -> None:
    with pytest.raises(LoraMissing, match="There are: "):
        LoraLibrary(ReceivedLoras(tmp_path / "none", 0), [folder]).named(name, model, model.spec.parameters)


def test_one_name_for_two(folder: Path, tmp_path: Path, model: Checkpoint) -> None:
    save(folder / "b" / "turbo.safetensors", model, 9)
    library = LoraLibrary(ReceivedLoras(tmp_path / "none", 0), [folder])
    with pytest.raises(LoraMissing, match="stands for 2"):
        library.named("turbo", model, model.spec.parameters)
    whole = read_lora(folder / "b" / "turbo.safetensors", model)
    assert library.named(whole.id[:10], model, model.spec.parameters).id == whole.id


def test_a_changed_file_is_another_lora(folder: Path, tmp_path: Path, model: Checkpoint) -> None:
    library, file = LoraLibrary(ReceivedLoras(tmp_path / "none", 0), [folder]), folder / "turbo.safetensors"
    before = read_lora(file, model)
    assert library.find(before.id, before.outline, model, model.spec.parameters) is not None
    save(file, model, 33)
    os.utime(file, ns=(1, 1))
    assert library.find(before.id, before.outline, model, model.spec.parameters) is None


def test_what_lies_in_the_workers_folder_is_never_sent_and_can_be_named(
    folder: Path, tmp_path: Path, model: Checkpoint
) -> None:
    plugins, inputs = load_plugins(), tiny.inputs(guidance=False)
    copy = tmp_path / "host" / "renamed.safetensors"
    copy.parent.mkdir()
    copy.write_bytes((folder / "turbo.safetensors").read_bytes())
    with mesh_home(tmp_path / "home"):
        worker = ThreadWorker((model.header.path,), plugins, "w0", "inproc://", loras=(folder,))
        try:
            with split(model.header.path, ":0", [worker], plugins) as run:
                run.set_loras([Applied(read_lora(copy, model), 0.5)])
                (placed,) = run.stats.loras
                assert placed["action"] == "reference" and placed["bytes_sent"] == 0
                expected = run(inputs)
                run.set_loras([Borrowed("turbo", 0.5)])
                assert torch.equal(run(inputs), expected)
                with pytest.raises(LoraMissing, match="There are: "):
                    run.set_loras([Borrowed("nonesuch")])
            with split(model.header.path, ":1", [worker], plugins) as run:
                with pytest.raises(LoraMissing, match="no file here"):
                    run.set_loras([Borrowed("turbo")])
        finally:
            worker.stop()


def test_what_an_earlier_version_received_is_found_where_it_lies(
    tmp_path: Path, model: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESH_HOME", str(tmp_path))
    lora, place = read_lora(save(tmp_path / "sent.safetensors", model, 5), model), tmp_path / "data" / "loras"
    part = Part(lora)
    place.mkdir(parents=True)
    (place / f"{lora.id}.safetensors").write_bytes(part.read(0, part.nbytes))
    (place / f"{lora.id}.json").write_text('{"name": "ink", "family": "klein"}')
    library = own_library(Settings.load())
    (listed,) = library.listing()
    assert (listed["name"], listed["family"], listed["id"]) == ("ink", "klein", lora.id) and listed["received"]
    found = library.find(lora.id, lora.outline, model, model.spec.parameters)
    assert found is not None and found.id == lora.id
    library.received.remove(lora.id)
    assert list(place.iterdir()) == []
