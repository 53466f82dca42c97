"""Checkpoints on disk: what a file or folder holds, found from headers alone.

Knows the folder layout of diffusers. Knows no model family: adapters say what the names mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from mesh_codec.memory import bytes_of
from mesh_core.errors import CheckpointCorrupt, CheckpointError, CheckpointUnrecognised
from mesh_core.model.gguf import read_gguf_header
from mesh_core.model.gguf_values import MAGIC
from mesh_core.model.safetensors import (
    MAX_HEADER_BYTES,
    FileHeader,
    opened,
    read_into,
    read_safetensors_header,
    refuse_lfs_pointer,
)
from mesh_core.model.stored import TensorInfo
from mesh_core.model.variants import default_file, files_of, variant_of
from mesh_core.system.file_stamp import FileStamp

ReadingProgress = Callable[[int, int], None]
"""Called with bytes done and bytes in total, while weights are read or hashed."""


@dataclass(frozen=True)
class CheckpointHeader:
    """Names, shapes and metadata of a checkpoint; no tensor data.

    Attributes:
        path: the file or folder that the user named.
        tensors: by the name in the file.
        metadata: of the files, all shards together: texts by name.
        config: ``config.json`` of a diffusers model folder, else empty.
        pipeline: ``model_index.json`` of a diffusers pipeline folder, else empty.
        values: tensors that are in memory, by name; they are not looked for in a file.
        folder: of that pipeline: `path`, or where a single file's other components are; None without a pipeline.
        variant: that was asked for, of a folder that holds several; None for the plain weights.
        stamps: of each file, from when its header was read.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    pipeline: Mapping[str, Any] = field(default_factory=dict)
    stamps: Mapping[Path, FileStamp] = field(default_factory=dict)
    variant: str | None = None
    folder: Path | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold weights, sorted."""
        return tuple(sorted({t.file for info in self.tensors.values() for t in _in_file(info)}))

    def opened(self, file: Path) -> AbstractContextManager[BinaryIO]:
        """One of the files for reading, as long as it is what it was; see `mesh_core.model.safetensors.opened`."""
        return opened(file, self.stamps.get(file))

    def content(self, info: TensorInfo, most: int = 1 << 16) -> bytes:
        """The bytes of a small tensor.

        Raises:
            CheckpointCorrupt: it has more than ``most`` bytes.
            CheckpointError: the file cannot be read, or is not the one that it was.
        """
        if info.nbytes > most:
            raise CheckpointCorrupt(f"{self.path}: {info.name} has {info.nbytes} bytes; at most {most} are expected.")
        if info.name in self.values:
            return bytes(bytes_of(self.values[info.name].detach().to("cpu").contiguous()))
        found = bytearray(info.nbytes)
        with self.opened(info.file) as stream:
            stream.seek(info.offset)
            read_into(stream, memoryview(found), info.file)
        return bytes(found)

    def component(self, name: str) -> Mapping[str, Any]:
        """``config.json`` of a pipeline's component; empty where there is none. Raises as `read_json`."""
        return read_json(self.folder / name / "config.json") if self.folder is not None else {}

    def place(self, tensor: str) -> tuple[str, int]:
        """Where a tensor lies, to read several in the order in which they lie on disk."""
        info = self.tensors[tensor]
        return str(info.file), info.offset


def _in_file(info: TensorInfo) -> Iterable[TensorInfo]:
    return [info] if info.stored is None else info.stored.parts.values()


def read_header(
    path: str | os.PathLike[str], most: int = MAX_HEADER_BYTES, variant: str | None = None
) -> CheckpointHeader:
    """The header of a .safetensors or GGUF file, a diffusers model folder, or the transformer of a pipeline folder.

    Args:
        most: bytes of the header of one file that are parsed.
        variant: of a folder's weights, ``fp16`` for example; "" for the plain ones, None for these, or the only ones.

    Raises:
        CheckpointUnrecognised: nothing there, not that variant, or neither safetensors nor GGUF.
        CheckpointCorrupt: truncated or damaged; names the file and the reason.
        CheckpointChanged: being written to.
    """
    path = Path(path)
    if path.is_file():
        return _of_files(path, [path], most)
    if not path.is_dir():
        raise CheckpointUnrecognised(
            f"There is no checkpoint at {path}.", hint="a .safetensors or .gguf file, or a folder saved by diffusers"
        )
    folder = weights_folder(path)
    files = _weight_files(folder, variant)
    config, pipeline = read_json(folder / "config.json"), read_json(path / "model_index.json")
    return _of_files(
        path, files, most, config=config, pipeline=pipeline, variant=variant, folder=path if pipeline else None
    )


def weights_folder(path: Path) -> Path:
    """Where a diffusers folder has the weights of its transformer: itself, or a folder in that of a pipeline."""
    inside = path / "transformer"
    return inside if (path / "model_index.json").is_file() and inside.is_dir() else path


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    files = files_of(folder, variant)
    if files[0].suffix == ".json":
        return _shards(folder, files[0])
    default = default_file(folder, variant_of(files[0]))
    if len(files) == 1:
        return files
    if default in files:
        return [default]
    listed = ", ".join(f.name for f in files[:5])
    raise CheckpointUnrecognised(f"{folder} holds several checkpoints: {listed}.", hint="the path of one of them")


def _shards(folder: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointCorrupt(f"{index} does not say which shard holds which tensor.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointCorrupt(f"{index} names a shard outside its folder: {name!r}.")
        if not (folder / name).is_file():
            raise CheckpointCorrupt(
                f"{folder} lacks the shard {name} that its index names.", hint="copy the whole folder again"
            )
    return [folder / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file.

    Raises:
        CheckpointUnrecognised: a pointer of Git LFS is in its place.
        CheckpointCorrupt: it cannot be read.
    """
    if not path.is_file():
        return {}
    try:
        content = path.read_bytes()
        refuse_lfs_pointer(path, content)
        value = json.loads(content.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointCorrupt(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointCorrupt(f"{path} does not hold a JSON object.")
    return value


def _read_file_header(file: Path, most: int) -> FileHeader:
    """By content: people rename files."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(MAGIC))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
    return read_gguf_header(file, most) if start == MAGIC else read_safetensors_header(file, most)


def _of_files(path: Path, files: list[Path], most: int, **parts: Any) -> CheckpointHeader:
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    stamps: dict[Path, FileStamp] = {}
    for file in files:
        found = _read_file_header(file, most)
        metadata |= found.metadata
        stamps[file] = found.stamp
        doubles = tensors.keys() & found.tensors.keys()
        if doubles:
            raise CheckpointCorrupt(f"{file} repeats the tensor {min(doubles)} of another shard.")
        tensors |= found.tensors
    return CheckpointHeader(path=path, tensors=tensors, metadata=metadata, stamps=stamps, **parts)
