"""Identity of a model: the BLAKE3 hash of every weight's content, whatever file layout it came in.

``fingerprint = blake3(version, for each parameter in name order: name, dtype, shape, blake3(bytes))`` over the
parameters as `ModelSpec` names them. It differs if any bit of any weight differs, and is the same for a sharded
folder, a single file, and a file that stores several parameters fused. Hashing reads the whole checkpoint once
(20 GB at the speed of the disk; BLAKE3 itself runs at several GB/s on a few cores); the result is remembered by
path and stamp of the files: a file that was replaced or written to is hashed anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping

import torch
from blake3 import blake3
from torch import Tensor, nn

from mesh_codec.dtypes import from_torch
from mesh_codec.memory import bytes_of
from mesh_core.model.checkpoint import CheckpointHeader, ReadingProgress
from mesh_core.model.safetensors import read_into
from mesh_core.model.spec import ModelSpec, ParameterSpec
from mesh_core.model.stored_weight import StoredWeight
from mesh_core.model.tensors import stored_tensors
from mesh_core.model.weights import WeightReader
from mesh_core.system.forks import hash_threads
from mesh_core.system.remembered import Remembered

_VERSION = b"mesh-fingerprint-1"
_CHUNK = 16 << 20


def structure(spec: ModelSpec) -> str:
    """Hash of the family, of all parameters' names, shapes and dtypes and of what shows in none of them: equal
    structure is a precondition for computing the same, and costs nothing."""
    digest = blake3(_VERSION + spec.family.encode())
    if spec.invisible:
        digest.update(json.dumps(spec.invisible, sort_keys=True).encode())
    for name, p in sorted(spec.parameters.items()):
        digest.update(_label(name, p.dtype, p.shape))
    return digest.hexdigest()


def of_checkpoint(
    header: CheckpointHeader, spec: ModelSpec, progress: ReadingProgress | None = None, *, anew: bool = False
) -> str:
    """The fingerprint of a checkpoint; remembered, so that only the first call reads the weights.

    Args:
        anew: read them whatever is remembered.

    Raises:
        CheckpointError: a file is not the one that it was when its header was read, or cannot be read.
    """
    found = None if anew else known(header, spec)
    if found is None:
        found = _combine((name, p.dtype, p.shape, d) for name, p, d in _hash_files(header, spec.parameters, progress))
        _memory(header, spec).put(found)
    return found


def known(header: CheckpointHeader, spec: ModelSpec) -> str | None:
    """The remembered fingerprint of a checkpoint, or None when it would have to be computed."""
    found = _memory(header, spec).get()
    return found if isinstance(found, str) and len(found) == 64 else None


def _memory(header: CheckpointHeader, spec: ModelSpec) -> Remembered:
    return Remembered("fingerprints", {file: header.stamps[file] for file in header.files}, structure(spec))


def of_model(spec: ModelSpec, model: nn.Module) -> str:
    """The fingerprint of a model in memory whose parameters are all present."""
    return of_values(spec, stored_tensors(model).__getitem__)


def of_values(spec: ModelSpec, value: Callable[[str], Tensor]) -> str:
    """The fingerprint of parameters that ``value`` gives by name, each in the type that it has in the checkpoint."""

    def parts() -> Iterable[tuple[str, str, tuple[int, ...], bytes]]:
        for name in sorted(spec.parameters):
            tensor = value(name)
            label = tensor.label if isinstance(tensor, StoredWeight) else from_torch(tensor.dtype).safetensors
            yield name, label, spec.parameters[name].shape, of_tensor(tensor)

    return _combine(parts())


def of_tensor(tensor: Tensor) -> bytes:
    """BLAKE3 of a tensor's bytes in row-major order (32 bytes); of a stored weight, that of its parts by role."""
    if isinstance(tensor, StoredWeight):
        digest = blake3()
        for role, part in sorted(tensor.parts.items()):
            digest.update(_label(role, from_torch(part.dtype).safetensors, tuple(part.shape)) + of_tensor(part))
        return digest.digest()
    return blake3(bytes_of(tensor.detach().to("cpu").contiguous()), max_threads=hash_threads()).digest()


def _label(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    return json.dumps([name, dtype, list(shape)]).encode()


def _combine(parts: Iterable[tuple[str, str, tuple[int, ...], bytes]]) -> str:
    digest = blake3(_VERSION)
    for name, dtype, shape, content in sorted(parts):
        digest.update(_label(name, dtype, shape) + content)
    return digest.hexdigest()


def _hash_files(
    header: CheckpointHeader, parameters: Mapping[str, ParameterSpec], progress: ReadingProgress | None
) -> Iterable[tuple[str, ParameterSpec, bytes]]:
    buffer = memoryview(bytearray(_CHUNK))
    infos = header.tensors
    total = sum(t.nbytes for t in infos.values())
    done = 0
    reader = WeightReader(header)
    for name, spec in sorted(parameters.items(), key=lambda item: header.place(item[1].pieces[0].tensor)):
        if spec.in_a_format:
            yield name, spec, of_tensor(reader.read_stored(spec, torch.bfloat16))
            done += sum(infos[piece.tensor].nbytes for piece in spec.pieces)
            if progress is not None:
                progress(min(done, total), total)
            continue
        digest = blake3(max_threads=hash_threads())
        for piece in spec.pieces:
            info = infos[piece.tensor]
            row = info.nbytes // info.shape[0] if info.shape and info.shape[0] else info.nbytes
            stop = info.nbytes if piece.stop is None else piece.stop * row
            position = piece.start * row
            with header.opened(info.file) as stream:
                stream.seek(info.offset + position)
                while position < stop:
                    part = buffer[: min(_CHUNK, stop - position)]
                    read_into(stream, part, info.file)
                    digest.update(part)
                    position += len(part)
                    done += len(part)
                    if progress is not None:
                        progress(done, total)
        yield name, spec, digest.digest()
