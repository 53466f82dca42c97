"""Reading a stage's parameters from a checkpoint, and no more than those.

A parameter is read straight into the memory that it will live in (or into one staging tensor when it goes to
another device or dtype), so the peak of host memory is the stage plus one parameter.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mesh_codec.dtypes import from_safetensors
from mesh_codec.memory import bytes_of
from mesh_core.errors import CheckpointCorrupt
from mesh_core.model.checkpoint import CheckpointHeader, ReadingProgress
from mesh_core.model.pool import ParameterPool
from mesh_core.model.safetensors import read_into
from mesh_core.model.spec import ParameterSpec


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
        self, model: nn.Module, parameters: Mapping[str, ParameterSpec], *, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Give ``model`` the ``parameters``, read in the order in which they lie on disk.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or the file is not the one that it was.
        """
        ordered = sorted(parameters.items(), key=lambda item: self.header.place(item[1].pieces[0].tensor))
        total = sum(p.elements for p in parameters.values()) * dtype.itemsize
        done = 0
        for name, spec in ordered:
            key = (self.model, name, device, dtype)
            parameter = self._pool.get(key) if self.model else None
            if parameter is None:
                kept = self._pool.get((self.model, name, torch.device("cpu"), dtype)) if self.model else None
                data = self.read(spec) if kept is None else kept.data
                parameter = nn.Parameter(data.to(device, dtype), requires_grad=False)
                if self.model:
                    self._pool.put(key, parameter)
            assign(model, name, parameter)
            done += parameter.nbytes
            if self._progress is not None:
                self._progress(done, total)

    def read(self, spec: ParameterSpec) -> Tensor:
        """One parameter in the file's dtype, on the CPU. Raises CheckpointError."""
        tensor = torch.empty(spec.shape, dtype=from_safetensors(spec.dtype).torch)
        rows = spec.shape[0] if spec.shape else 1
        row_bytes = tensor.nbytes // rows if rows else 0
        target = bytes_of(tensor)
        filled = 0
        for piece in spec.pieces:
            info = self.header.tensors[piece.tensor]
            stop = piece.stop if piece.stop is not None else (info.shape[0] if info.shape else 1)
            size = (stop - piece.start) * row_bytes
            with self.header.opened(info.file) as stream:
                stream.seek(info.offset + piece.start * row_bytes)
                read_into(stream, target[filled : filled + size], info.file)
            filled += size
        if filled != tensor.nbytes:
            raise CheckpointCorrupt(f"The pieces of a parameter hold {filled} bytes instead of {tensor.nbytes}.")
        self.bytes_read += filled
        return tensor


def assign(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put ``parameter`` in the place of the model's parameter ``name``, on whatever device that is.

    Raises:
        CheckpointCorrupt: another shape.
    """
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    placeholder = owner._parameters[leaf]
    if placeholder is None or placeholder.shape != parameter.shape:
        raise CheckpointCorrupt(f"{name} has shape {tuple(parameter.shape)}, the model needs another.")
    owner._parameters[leaf] = parameter
