"""A file that is replaced or written to while it is in use gives an error or its old weights, never a mixture."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mesh_core.errors import CheckpointChanged, CheckpointError
from mesh_core.model import fingerprint
from mesh_core.model.checkpoint import CheckpointHeader, read_header
from mesh_core.model.numerics import Numerics
from mesh_core.model.pool import ParameterPool
from mesh_core.model.spans import BlockSpan
from mesh_core.model.spec import ModelSpec
from mesh_core.model.weights import WeightReader
from mesh_core.system.file_stamp import FileStamp
from mesh_klein import KleinAdapter
from tests.adapters import tiny
from tests.support.workers import mesh_home

ADAPTER = KleinAdapter()
CPU = torch.device("cpu")
OLD, NEW = (tiny.transformer(guidance=False, doubles=1, singles=1, seed=seed) for seed in (0, 1))
Way = Callable[[Path], None]


@pytest.fixture(autouse=True)
def home(tmp_path: Path) -> object:
    with mesh_home(tmp_path / "home"):
        yield


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.safetensors"
    save_file(dict(OLD.state_dict()), path)
    return path


def recognised(path: Path) -> tuple[CheckpointHeader, ModelSpec]:
    header = read_header(path)
    spec = ADAPTER.recognise(header)
    assert spec is not None
    return header, spec


def replaced(file: Path) -> None:
    """By another of the same size and modification time."""
    found, other = file.stat(), file.with_suffix(".new")
    save_file(dict(NEW.state_dict()), other)
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    os.replace(other, file)


def overwritten(file: Path) -> None:
    other = file.with_suffix(".new")
    save_file(dict(NEW.state_dict()), other)
    with file.open("r+b") as stream:
        stream.write(other.read_bytes())


def overwritten_and_dated_back(file: Path) -> None:
    found = file.stat()
    overwritten(file)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


def one_bit_flipped_and_dated_back(file: Path) -> None:
    found = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


WAYS: list[Way] = [replaced, overwritten]
if sys.platform != "win32":
    # Windows does not tell when a file was written to whose modification time was set back.
    WAYS += [overwritten_and_dated_back, one_bit_flipped_and_dated_back]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


@every_way
def test_a_remembered_fingerprint_belongs_to_the_file_that_was_hashed(file: Path, way: Way) -> None:
    before = fingerprint.of_checkpoint(*recognised(file))
    assert fingerprint.known(*recognised(file)) == before
    way(file)
    assert fingerprint.known(*recognised(file)) is None
    assert fingerprint.of_checkpoint(*recognised(file)) != before


@every_way
def test_what_changed_since_its_header_was_read_is_neither_hashed_nor_loaded(file: Path, way: Way) -> None:
    header, spec = recognised(file)
    way(file)
    with pytest.raises(CheckpointChanged, match=r"m\.safetensors changed while it was in use"):
        fingerprint.of_checkpoint(header, spec)
    assert fingerprint.known(header, spec) is None
    with pytest.raises(CheckpointChanged) as told:
        ADAPTER.build_stage(spec, BlockSpan(0, 2), WeightReader(header), device=CPU, numerics=Numerics(torch.float32))
    assert told.value.hint


@every_way
def test_what_changes_while_it_is_read_is_not_used(file: Path, way: Way) -> None:
    header, spec = recognised(file)
    count, original = 0, dict(OLD.named_parameters())

    def progress(done: int, total: int) -> None:
        nonlocal count
        count += 1
        if count == 3:
            way(file)

    pool = ParameterPool()
    reader = WeightReader(header, model="old", pool=pool, progress=progress)
    with torch.device("meta"):
        model = ADAPTER.skeleton(spec)
    with pytest.raises(CheckpointChanged):
        reader.fill(model, spec.parameters, device=CPU, numerics=Numerics(torch.float32))
    held = {name: p for name, p in model.named_parameters() if not p.is_meta}
    assert len(held) == 3 and all(torch.equal(p, original[name]) for name, p in held.items())


@every_way
def test_what_changes_while_it_is_hashed_has_no_fingerprint(file: Path, way: Way) -> None:
    header, spec = recognised(file)
    seen: list[int] = []

    def progress(done: int, total: int) -> None:
        seen.append(done)
        # Windows replaces no file that is open; between two parameters none is.
        if len(seen) == 1 and not (way is replaced and sys.platform == "win32"):
            way(file)

    if way is replaced and sys.platform == "win32":
        way(file)
    with pytest.raises(CheckpointChanged):
        fingerprint.of_checkpoint(header, spec, progress)
    assert fingerprint.known(header, spec) is None


def test_a_stamp_is_taken_when_the_next_write_is_sure_to_change_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for i in range(20):
        path.write_bytes(b"%3d" % i)
        stamp = FileStamp.at(path)
        with path.open("r+b") as stream:
            stream.write(b"xyz")
        assert FileStamp.at(path) != stamp


def test_a_file_that_is_gone_is_named(file: Path) -> None:
    header, spec = recognised(file)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"m\.safetensors cannot be read: No such file"):
        fingerprint.of_checkpoint(header, spec)
