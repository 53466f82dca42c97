"""Checkpoints on disk: the layouts that are read, and what is said of damaged ones."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mesh_core.errors import CheckpointCorrupt, CheckpointError, CheckpointUnrecognised
from mesh_core.model.checkpoint import read_header
from mesh_core.model.folders import find_checkpoints
from tests.adapters import tiny

TWO = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def written(path: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file with ``header`` (as JSON, or as it is if bytes) and ``data`` behind it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_single_file(tmp_path: Path) -> None:
    file = tmp_path / "two.safetensors"
    save_file(TWO, file, {"made": "here"})
    header = read_header(file)
    assert {n: (t.dtype, t.shape, t.nbytes) for n, t in header.tensors.items()} == {
        "a": ("F32", (2, 3), 24),
        "b": ("BF16", (4,), 8),
    }
    assert header.metadata == {"made": "here"} and header.config == {} and header.files == (file,)


def test_a_model_folder_in_shards_holds_what_the_whole_one_holds(tmp_path: Path) -> None:
    model = tiny.transformer(guidance=False)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    whole, shards = read_header(tmp_path / "whole"), read_header(tmp_path / "shards")
    assert len(whole.files) == 1 and len(shards.files) > 3
    assert {n: t.shape for n, t in whole.tensors.items()} == {n: t.shape for n, t in shards.tensors.items()}
    assert shards.config["_class_name"] == "Flux2Transformer2DModel"


def test_of_a_pipeline_folder_the_transformer_is_read(tmp_path: Path) -> None:
    tiny.transformer(guidance=False).save_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Flux2KleinPipeline"}))
    header = read_header(tmp_path)
    assert header.pipeline["_class_name"] == "Flux2KleinPipeline"
    assert header.tensors and {f.parent.name for f in header.files} == {"transformer"}


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def appended(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def cut_in_the_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:40])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def shorter_than_a_length(file: Path) -> None:
    file.write_bytes(b"\1\2\3")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncated, "truncated: it has"),
        (appended, "1 bytes more than its header promises"),
        (cut_in_the_header, "not a safetensors file, or its start is damaged"),
        (emptied, "not a safetensors file"),
        (shorter_than_a_length, "not a safetensors file"),
    ],
)
def test_damage_to_a_file_is_named(damage: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    file = tmp_path / "two.safetensors"
    save_file(TWO, file)
    damage(file)
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert str(file) in str(caught.value) and says in str(caught.value)


BAD_HEADERS: dict[str, Any] = {
    "no JSON": b"not json at all!",
    "not UTF-8": b'{"\xff\xfe": 1}',
    "a list": [],
    "a number": 3,
    "deeply nested": b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deeply nested maps": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "an endless number": b'{"a": ' + b"9" * 10_000 + b"}",
    "metadata that is no map": {"__metadata__": ["x"], "a": entry()},
    "metadata that is no text": {"__metadata__": {"x": 1}, "a": entry()},
    "an entry that is no map": {"a": [1]},
    "an entry without a shape": {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
    "a shape of text": {"a": entry(shape="22")},
    "a negative shape": {"a": entry(shape=[-2, -1])},
    "a shape of fractions": {"a": entry(shape=[2.0])},
    "a shape of truths": {"a": entry(shape=[True, 2])},
    "a shape without end": {"a": entry(shape=[10**30, 10**30])},
    "offsets backwards": {"a": entry(begin=8, end=0)},
    "offsets of text": {"a": entry(begin="0", end="8")},
    "three offsets": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}},
    "a dtype of numbers": {"a": {"dtype": 3, "shape": [2], "data_offsets": [0, 8]}},
    "a size that does not fit its shape": {"a": entry(shape=[3])},
    "an overlap": {"a": entry(), "b": entry(begin=4, end=12)},
    "twice the same bytes": {"a": entry(), "b": entry()},
    "a gap": {"a": entry(shape=[1], end=4), "b": entry(shape=[1], begin=8, end=12)},
    "a gap at the start": {"a": entry(begin=4, end=12)},
}


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_bad_header_is_an_error_that_names_the_file(header: Any, tmp_path: Path) -> None:
    file = written(tmp_path / "bad.safetensors", header, bytes(12))
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert str(file) in str(caught.value) and len(str(caught.value)) < 5000


@pytest.mark.parametrize("length", [0, 1 << 62, (1 << 64) - 1, 100_000_001, 9])
def test_a_header_that_lies_about_its_length_allocates_nothing(length: int, tmp_path: Path) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"x" * 8)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
        read_header(file)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    tiny.transformer(guidance=False).save_pretrained(tmp_path, max_shard_size="100KB")
    return tmp_path


def test_a_missing_shard_is_named(shards: Path) -> None:
    gone = sorted(shards.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointCorrupt, match=gone.name):
        read_header(shards)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../elsewhere.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "sub/x.safetensors"},
        {"a": ".."},
        {"a": ""},
        {"a": 3, "b": "x.safetensors"},
        {"a": ["x"]},
        ["x.safetensors"],
        "x.safetensors",
        None,
    ],
    ids=str,
)
def test_an_index_that_points_elsewhere_or_nowhere_is_refused(shards: Path, weight_map: Any) -> None:
    (shards.parent / "elsewhere.safetensors").write_bytes(b"")
    (index,) = shards.glob("*.index.json")
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointCorrupt, match=str(shards)):
        read_header(shards)


def test_a_tensor_in_two_shards_is_refused(shards: Path) -> None:
    first, second = sorted(shards.glob("*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointCorrupt, match="repeats the tensor"):
        read_header(shards)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000], ids=["cut off", "a list", "deeply nested"])
def test_a_damaged_config_is_named(shards: Path, text: str) -> None:
    (shards / "config.json").write_text(text)
    with pytest.raises(CheckpointCorrupt, match=r"config\.json"):
        read_header(shards)


@pytest.mark.parametrize("name", ["config.json", "*.index.json", "*00002-of-*.safetensors"])
def test_a_pointer_of_git_lfs_in_place_of_a_file_is_called_one(shards: Path, name: str) -> None:
    (file,) = shards.glob(name)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    with pytest.raises(CheckpointUnrecognised, match=f"{file.name} is a pointer of Git LFS") as told:
        read_header(shards)
    assert "git lfs pull" in told.value.hint


def test_variants_beside_each_other_are_read_one_by_one(tmp_path: Path) -> None:
    kinds: dict[str | None, dict[str, Any]] = {None: {}, "fp16": {}, "ema": {"max_shard_size": "100KB"}}
    for seed, (variant, more) in enumerate(kinds.items()):
        tiny.transformer(guidance=False, seed=seed).save_pretrained(tmp_path, variant=variant, **more)
    found = {variant: read_header(tmp_path, variant=variant) for variant in (*kinds, "")}
    assert [len(header.files) > 1 for header in found.values()] == [False, False, True, False]
    assert found[None].files == found[""].files == (tmp_path / "diffusion_pytorch_model.safetensors",)
    assert found["fp16"].files == (tmp_path / "diffusion_pytorch_model.fp16.safetensors",)
    assert all(".ema-0" in file.name for file in found["ema"].files)
    with pytest.raises(CheckpointUnrecognised, match=r"no weights of the variant '\.\./fp16'"):
        read_header(tmp_path, variant="../fp16")


def test_the_only_variant_needs_no_name_and_several_do(tmp_path: Path) -> None:
    for variant in ("fp16", "ema"):
        tiny.transformer(guidance=False).save_pretrained(tmp_path, variant=variant)
        if variant == "fp16":
            assert read_header(tmp_path).files == (tmp_path / "diffusion_pytorch_model.fp16.safetensors",)
    with pytest.raises(CheckpointUnrecognised, match="'ema', 'fp16'") as told:
        read_header(tmp_path)
    assert "variant='ema'" in told.value.hint


def test_a_folder_without_weights_and_one_with_several_say_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointUnrecognised, match=r"holds no \.safetensors file"):
        read_header(tmp_path)
    for name in ("one", "two"):
        save_file(TWO, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointUnrecognised, match=r"one\.safetensors, two\.safetensors") as caught:
        read_header(tmp_path)
    assert "path of one" in caught.value.hint
    with pytest.raises(CheckpointUnrecognised, match="no checkpoint at"):
        read_header(tmp_path / "nothing")


def test_an_unknown_type_is_left_to_the_adapter(tmp_path: Path) -> None:
    header = read_header(written(tmp_path / "fp8.safetensors", {"a": entry("F8_FUTURE", [8], 0, 8)}, bytes(8)))
    assert header.tensors["a"].dtype == "F8_FUTURE"


def test_checkpoints_are_found_once_each_through_links_and_loops(tmp_path: Path) -> None:
    root = tmp_path / "models"
    tiny.transformer(guidance=False).save_pretrained(root / "pipe" / "transformer")
    (root / "pipe" / "model_index.json").write_text("{}")
    tiny.transformer(guidance=False).save_pretrained(root / "deep" / "er" / "model")
    save_file(TWO, root / "deep" / "single.safetensors")
    save_file(TWO, tmp_path / "elsewhere.safetensors")
    (root / "linked.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    (root / "deep" / "loop").symlink_to(root, target_is_directory=True)
    (root / "itself").symlink_to(root / "itself")
    (root / "again").symlink_to(root / "deep", target_is_directory=True)
    (root / "dangling.safetensors").symlink_to(tmp_path / "gone")
    (root / ".hidden").mkdir()
    save_file(TWO, root / ".hidden" / "x.safetensors")
    found = [str(p.relative_to(root)) for p in find_checkpoints(root)]
    assert sorted(found) == ["again/er/model", "again/single.safetensors", "linked.safetensors", "pipe"]


def test_a_folder_that_cannot_be_listed_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file(TWO, tmp_path / name / "x.safetensors")
    listed = Path.iterdir

    def iterdir(self: Path) -> Any:
        if self.name == "a":
            raise PermissionError(13, "Permission denied", str(self))
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert list(find_checkpoints(tmp_path)) == [tmp_path / "b" / "x.safetensors"]


def test_a_named_file_is_its_own_checkpoint(tmp_path: Path) -> None:
    save_file(TWO, tmp_path / "x.safetensors")
    assert list(find_checkpoints(tmp_path / "x.safetensors")) == [tmp_path / "x.safetensors"]
