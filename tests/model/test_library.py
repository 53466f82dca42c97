"""What a worker says of the files in its folders that it does not use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mesh_core.builtin import load_plugins
from mesh_core.errors import CheckpointChanged, CheckpointCorrupt, CheckpointMismatch, CheckpointUnrecognised
from mesh_core.model import fingerprint
from mesh_core.model.checkpoint import read_header
from mesh_core.model.library import CheckpointLibrary, recognise
from mesh_core.plugins.registry import Plugins
from tests.adapters import tiny

MODEL = tiny.transformer(guidance=False, doubles=1, singles=1)


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return load_plugins()


def in_int8(path: Path) -> Path:
    """Codes without scales and without a word of what they mean."""
    save_file({name: t.to(torch.int8) for name, t in MODEL.state_dict().items()}, path)
    return path


def in_fp8(path: Path) -> Path:
    save_file({name: t.to(torch.float8_e4m3fn) for name, t in MODEL.state_dict().items()}, path)
    return path


def gguf(path: Path) -> Path:
    path.write_bytes(b"GGUF" + bytes(100))
    return path


def test_another_type_of_the_same_model_is_named_with_what_to_do(plugins: Plugins, tmp_path: Path) -> None:
    here = tmp_path / "host.safetensors"
    save_file(dict(MODEL.state_dict()), here)
    mine = recognise(read_header(here), plugins)
    wanted = mine.spec.family, fingerprint.structure(mine.spec), fingerprint.of_checkpoint(mine.header, mine.spec)
    folder = tmp_path / "worker"
    folder.mkdir()
    library = CheckpointLibrary([folder], plugins)
    with pytest.raises(CheckpointMismatch) as told:
        library.find(*wanted)
    assert told.value.hint == "the same file on both machines"
    other = in_fp8(folder / "klein-fp8.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"klein-fp8\.safetensors \(custom .*fp8-cast/F8_E4M3\)"):
        library.find(*wanted)
    other.unlink()
    in_int8(folder / "klein-int8.safetensors")
    for find in (lambda: library.find(*wanted), lambda: library.like(*wanted[:2])):
        with pytest.raises(CheckpointMismatch, match=r"klein-int8\.safetensors stores .* as I8") as told:
            find()
        assert "bfloat16 copy" in told.value.hint and str(tmp_path) not in str(told.value)


def test_a_scan_knows_what_it_left_out_and_why(plugins: Plugins, tmp_path: Path) -> None:
    codes, packed, broken = in_int8(tmp_path / "a.safetensors"), gguf(tmp_path / "b.gguf"), tmp_path / "c.safetensors"
    save_file(dict(MODEL.state_dict()), broken)
    broken.write_bytes(broken.read_bytes()[:-1])
    other = tmp_path / "d.safetensors"
    save_file({"x": torch.ones(2)}, other)
    (tmp_path / "notes.txt").write_text("no model")
    library = CheckpointLibrary([tmp_path], plugins)
    assert library.scan() == []
    assert {path: type(error) for path, error in library.skipped.items()} == {
        codes: CheckpointUnrecognised,
        packed: CheckpointUnrecognised,
        broken: CheckpointCorrupt,
        other: CheckpointUnrecognised,
    }
    assert "GGUF" in str(library.skipped[packed])
    broken.unlink()
    library.scan()
    assert broken not in library.skipped


@pytest.mark.parametrize("name", ["flux2.gguf", "flux2.safetensors"])
def test_gguf_is_known_whatever_the_file_is_called(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointUnrecognised, match="is a GGUF file of version 0; versions 2 and 3 are read"):
        read_header(gguf(tmp_path / name))


def test_one_file_that_cannot_be_read_hides_no_other(
    plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("a", 1), ("b", 0)):
        model = tiny.transformer(guidance=False, doubles=1, singles=1, seed=seed)
        save_file(dict(model.state_dict()), tmp_path / f"{name}.safetensors")
    library = CheckpointLibrary([tmp_path], plugins)
    one, two = library.scan()
    wanted = two.spec.family, fingerprint.structure(two.spec), fingerprint.of_checkpoint(two.header, two.spec)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("MESH_HOME", str(tmp_path / "home"))
    hashed = fingerprint.of_checkpoint

    def moving(header: object, *rest: object) -> str:
        if header == one.header:
            raise CheckpointChanged("a.safetensors changed while it was in use.")
        return hashed(header, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(fingerprint, "of_checkpoint", moving)
    assert library.find(*wanted).name == "b.safetensors"
    with pytest.raises(CheckpointChanged):
        library.find(*wanted[:2], "0" * 64)
