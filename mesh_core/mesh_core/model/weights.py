"""Reading a stage's parameters from a checkpoint, and no more than those.

A parameter is read straight into the memory that it will live in (or into one staging tensor when it goes to
another device or dtype), so the peak of host memory is the stage plus one parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from mesh_codec.dtypes import from_safetensors
from mesh_codec.memory import bytes_of
from mesh_core.errors import CheckpointCorrupt
from mesh_core.model.checkpoint import CheckpointHeader, ReadingProgress
from mesh_core.model.numerics import Numerics
from mesh_core.model.pool import ParameterPool, PoolKey
from mesh_core.model.safetensors import read_into
from mesh_core.model.spec import ParameterSpec, Piece
from mesh_core.model.stored import TensorInfo
from mesh_core.model.stored_weight import StoredWeight
from mesh_core.model.tensors import stored_place

_Held = TypeVar("_Held", bound=Tensor)


class WeightReader:
    """Parameters of one checkpoint.

    Args:
        header: of the checkpoint.
        model: names the weights in ``pool``: the fingerprint.
        pool: parameters that are already in memory are taken from there, new ones are added.
        progress: called after each parameter.

    ``bytes_read`` counts what came from disk.
    """

    def __init__(
        self,
        header: CheckpointHeader,
        *,
        model: str = "",
        pool: ParameterPool | None = None,
        progress: ReadingProgress | None = None,
    ) -> None:
        self.header = header
        self.model = model
        self.bytes_read = 0
        self._pool = pool or ParameterPool()
        self._progress = progress

    def fill(
        self,
        model: nn.Module,
        parameters: Mapping[str, ParameterSpec],
        *,
        device: torch.device,
        numerics: Numerics,
    ) -> None:
        """Give ``model`` the ``parameters``, read in the order in which they lie on disk.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or the file is not the one that it was.
        """
        ordered = sorted(parameters.items(), key=lambda item: self.header.place(item[1].pieces[0].tensor))
        total = sum(numerics.nbytes(name, p) for name, p in parameters.items())
        done = 0
        for name, spec in ordered:
            key = pool_key(self.model, name, spec, device, numerics)
            parameter = self._pool.get(key) if self.model else None
            if parameter is None:
                kept = self._pool.get((*key[:2], torch.device("cpu"), *key[3:])) if self.model else None
                parameter = self._on(device, name, spec, numerics) if kept is None else moved(kept, device)
                if self.model:
                    self._pool.put(key, parameter)
            assign(model, name, parameter)
            done += parameter.nbytes
            if self._progress is not None:
                self._progress(done, total)

    def _on(self, device: torch.device, name: str, spec: ParameterSpec, numerics: Numerics) -> nn.Parameter:
        dtype = numerics.dtype_of(name, spec)
        if not spec.in_a_format:
            data = self.read(spec).to(device, dtype)
        else:
            stored = self.read_stored(spec, dtype, numerics.arithmetic_of(spec)).on(device)
            data = stored if spec.stored_bytes is not None else stored.dense()
        return nn.Parameter(data, requires_grad=False)

    def read(self, spec: ParameterSpec) -> Tensor:
        """One parameter, which is stored as its numbers, in the file's dtype, on the CPU. Raises CheckpointError."""
        infos = [self.header.tensors[piece.tensor] for piece in spec.pieces]
        rows = [_rows(piece, info) for piece, info in zip(spec.pieces, infos, strict=True)]
        return self._rows(infos, rows, spec.shape)

    def read_stored(self, spec: ParameterSpec, dtype: torch.dtype, arithmetic: str = "") -> StoredWeight:
        """One parameter, which is stored in a format, on the CPU.

        Args:
            dtype: of its numbers.
            arithmetic: how they are made and computed with; "" for the format's default.

        Raises:
            CheckpointError: it cannot be read, or holds what cannot be.
        """
        pieces, stored = [], None
        for piece in spec.pieces:
            stored = self.header.tensors[piece.tensor].stored
            assert stored is not None, piece.tensor
            start, stop = _rows(piece, self.header.tensors[piece.tensor])
            parts = {
                role: self._rows([info], [(start, stop)] if role in stored.format.rows_in_file else [_all(info)])
                for role, info in stored.parts.items()
            }
            try:
                pieces.append(stored.format.in_memory(stored, parts, start, stop))
            except CheckpointCorrupt as error:
                raise CheckpointCorrupt(f"{self.header.path.name}: {error.message}", hint=error.hint) from error
        assert stored is not None, spec
        format, kind = stored.format, stored.kind
        joined = pieces[0] if len(pieces) == 1 else format.join(pieces)
        arithmetic = arithmetic or format.arithmetics(kind, dtype, torch.device("cpu"))[0]
        return StoredWeight(format, kind, spec.shape, dtype, joined, arithmetic)

    def _rows(
        self, infos: Sequence[TensorInfo], rows: Sequence[tuple[int, int]], shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """Rows of tensors in the file, one below the other; all of one type and width."""
        first = infos[0]
        if first.name in self.header.values:
            return self._held_rows(infos, rows, shape)
        count = sum(stop - start for start, stop in rows)
        made = torch.empty(shape or (count, *first.shape[1:])[: len(first.shape)], dtype=_type_of(first))
        target, filled = bytes_of(made), 0
        for info, (start, stop) in zip(infos, rows, strict=True):
            row_bytes = info.nbytes // info.shape[0] if info.shape and info.shape[0] else info.nbytes
            size = (stop - start) * row_bytes
            if filled + size > len(target):
                break
            with self.header.opened(info.file) as stream:
                stream.seek(info.offset + start * row_bytes)
                read_into(stream, target[filled : filled + size], info.file)
            filled += size
        if filled != made.nbytes:
            raise CheckpointCorrupt(f"The pieces of a parameter hold {filled} bytes instead of {made.nbytes}.")
        self.bytes_read += filled
        return made

    def _held_rows(
        self, infos: Sequence[TensorInfo], rows: Sequence[tuple[int, int]], shape: tuple[int, ...] | None
    ) -> Tensor:
        held = [self.header.values[info.name].detach() for info in infos]
        held = [exponents_as_bytes(t) for t in held]
        pieces = [t[start:stop] if t.dim() else t for t, (start, stop) in zip(held, rows, strict=True)]
        made = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return made if shape is None else made.reshape(shape)


def _rows(piece: Piece, info: TensorInfo) -> tuple[int, int]:
    return piece.start, piece.stop if piece.stop is not None else _all(info)[1]


def _all(info: TensorInfo) -> tuple[int, int]:
    return 0, info.shape[0] if info.shape else 1


def _type_of(info: TensorInfo) -> torch.dtype:
    # Scales that are exponents alone have no type in the table: their bytes are what counts.
    return torch.uint8 if info.dtype == "F8_E8M0" else from_safetensors(info.dtype).torch


def exponents_as_bytes(tensor: Tensor) -> Tensor:
    """Scales that are exponents alone as the bytes that files give; any other tensor as it is."""
    return tensor.view(torch.uint8) if tensor.dtype == getattr(torch, "float8_e8m0fnu", None) else tensor


def moved(parameter: _Held, device: torch.device) -> _Held:
    """The parameter or buffer on ``device``; itself if it is there."""
    if parameter.device == device:
        return parameter
    data = parameter.on(device) if isinstance(parameter, StoredWeight) else parameter.data.to(device)
    return cast(_Held, nn.Parameter(data, requires_grad=False) if isinstance(parameter, nn.Parameter) else data)


def pool_key(model: str, name: str, spec: ParameterSpec, device: torch.device, numerics: Numerics) -> PoolKey:
    """Under which stages share a parameter of a model, before it is there."""
    return model, name, device, numerics.dtype_of(name, spec), numerics.arithmetic_of(spec)


def key_of(model: str, name: str, parameter: nn.Parameter) -> PoolKey:
    """Under which stages share a parameter."""
    return model, name, parameter.device, parameter.dtype, getattr(parameter, "arithmetic", "")


def assign(model: nn.Module, name: str, parameter: Tensor) -> None:
    """Put ``parameter`` in the place of the model's parameter or persistent buffer ``name``, on whatever device it is.

    Raises:
        CheckpointCorrupt: another shape.
    """
    place, leaf = stored_place(model, name)
    placeholder = place[leaf]
    if placeholder is None or placeholder.shape != parameter.shape:
        raise CheckpointCorrupt(f"{name} has shape {tuple(parameter.shape)}, the model needs another.")
    place[leaf] = parameter
