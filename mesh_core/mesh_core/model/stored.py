"""How weights are stored that are not stored as their numbers: quantised ones, with scales beside their codes.

The unit is the tensor of a checkpoint. A `WeightFormat` says which tensors of a file belong together (codes, scales,
and markers that only name the format), brings them into one layout whatever file they come from, and makes numbers of
them.
Adapters see such tensors by their logical names and shapes, and know nothing of formats; see
`mesh_core.model.claims`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from mesh_core.errors import CheckpointUnrecognised

Parts = Mapping[str, Tensor]
"""What a stored weight consists of, by role, in the layout that its format has in memory whatever file it came from.

``codes`` is always among them, and its dimension 0 is the rows of the weight. A part with another number of rows is of
the whole weight."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint: where its bytes are.

    Attributes:
        dtype: as safetensors names it, known to us or not; of a stored weight its label.
        shape: of its numbers.
        offset: of its first byte in the file.
        stored: what its numbers follow from, where they are not what lies in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    stored: StoredTensor | None = None


class Header(Protocol):
    """What a format sees of a checkpoint: a `mesh_core.model.CheckpointHeader`."""

    @property
    def path(self) -> Path:
        """The file or folder that the user named."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """By the name in the file."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Of the file."""

    @property
    def config(self) -> Mapping[str, Any]:
        """``config.json`` of a diffusers model folder, else empty."""

    def content(self, info: TensorInfo, most: int = 1 << 16) -> bytes:
        """The bytes of a small tensor.

        Raises:
            CheckpointError: it has more than ``most`` bytes, or cannot be read.
        """


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint whose numbers follow from several others.

    Attributes:
        format: reads it.
        kind: which of the format's layouts it has, for example ``"F8_E4M3"`` or ``"Q4_K"``.
        shape: of the numbers.
        parts: the tensors in the file by role, ``codes`` among them, as they lie there.
    """

    format: WeightFormat
    kind: str
    shape: tuple[int, ...]
    parts: Mapping[str, TensorInfo]

    @property
    def label(self) -> str:
        """``FORMAT/KIND``: stands where the name of an element type stands for plain tensors."""
        return f"{self.format.name}/{self.kind}"


@dataclass(frozen=True)
class Claim:
    """What a format recognised in a checkpoint.

    Attributes:
        tensors: by logical name: that of the weight, ``X.weight``, whatever the parts are called.
        markers: tensors that hold no part of a weight: they name formats, or belong to computing in other types.
        metadata: entries of the file's metadata that the format has read to the end and agrees with.
        config: entries of ``config.json`` likewise.
    """

    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    markers: frozenset[str] = frozenset()
    metadata: frozenset[str] = frozenset()
    config: frozenset[str] = frozenset()


class WeightFormat(ABC):
    """A way to store weights. Stateless; one instance is registered through ``mesh_register_weight_formats``."""

    name: ClassVar[str]

    rows_in_file: ClassVar[frozenset[str]] = frozenset({"codes"})
    """Roles whose tensor in the file has the weight's rows along dimension 0: of these, only the rows that a parameter
    needs are read."""

    @abstractmethod
    def claim(self, header: Header) -> Claim:
        """What is stored in this format; an empty claim if nothing is.

        Looks at names, shapes, types, metadata and config, and at the content of marker tensors of a few hundred bytes
        (`Header.content`). Another format's tensors are left alone.

        Raises:
            CheckpointCorrupt: a companion is missing or does not fit its codes.
            CheckpointUnrecognised: a variant of the format that is not computed, or one that could be either of two.
        """

    @abstractmethod
    def in_memory(self, stored: StoredTensor, parts: Parts, start: int, stop: int) -> dict[str, Tensor]:
        """Rows ``start:stop`` of a weight in the layout of memory: equal content gives equal bytes.

        Args:
            parts: as in the file; of those in `rows_in_file`, these rows only.

        Raises:
            CheckpointCorrupt: scales that are no positive finite numbers, or content that cannot be.
        """

    def held(self, tensor: Tensor) -> tuple[str, tuple[int, ...], Parts] | Tensor | None:
        """What a program holds in memory in a class of its own for this format: the kind, the shape of the numbers and
        the parts; or the numbers, where the class only wraps them. None for a tensor that is none of it; the default
        knows no such class."""
        return None

    def join(self, pieces: Sequence[Parts]) -> dict[str, Tensor]:
        """Pieces of one layout, one above the other, as one weight. The default joins all parts by rows.

        Raises:
            CheckpointUnrecognised: they cannot be joined.
        """
        return {role: torch.cat([piece[role] for piece in pieces]) for role in pieces[0]}

    @abstractmethod
    def nbytes(self, stored: StoredTensor, rows: int) -> int:
        """Bytes in memory of that many rows, scales included; known from the header alone."""

    @abstractmethod
    def arithmetics(self, kind: str, dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
        """The ways of computing with a weight that can be done here, the default first.

        A name says whose way it is, what is done and in which type, for example ``"kitchen/fp8-dequant/bf16"``. Equal
        names give equal bits on one kind of device; what changes bits changes the name.
        """

    @abstractmethod
    def dequantise(
        self, parts: Parts, kind: str, shape: tuple[int, ...], dtype: torch.dtype, arithmetic: str
    ) -> Tensor:
        """The numbers of a weight in ``dtype``, a new tensor on the device of its codes."""

    def linear(
        self,
        x: Tensor,
        parts: Parts,
        kind: str,
        shape: tuple[int, ...],
        bias: Tensor | None,
        arithmetic: str,
    ) -> Tensor:
        """``x`` [..., shape[1]] times the weight, [..., shape[0]] in the type of ``x``. Dequantised first."""
        return linear(x, self.dequantise(parts, kind, shape, x.dtype, arithmetic), bias)

    def transient(self, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes that `linear` needs for the moment, besides its result; the default is the numbers alone."""
        rows, columns = shape[0], 1
        for size in shape[1:]:
            columns *= size
        return rows * columns * dtype.itemsize


def format_of(label: str, formats: Mapping[str, WeightFormat]) -> tuple[WeightFormat, str]:
    """The format and the kind that a label names, see `StoredTensor.label`.

    Raises:
        CheckpointUnrecognised: the format is not installed here.
    """
    name, _, kind = label.partition("/")
    if name not in formats:
        raise CheckpointUnrecognised(
            f"Weights stored as {label[:80]!r} are not read here; formats: {', '.join(sorted(formats)) or 'none'}.",
            hint="the same packages as on the machine that has them",
        )
    return formats[name], kind


def check_arithmetic(format: WeightFormat, kind: str, wanted: str, dtype: torch.dtype, device: torch.device) -> None:
    """Raises:
    CheckpointUnrecognised: this machine does not have that way of computing.
    """
    here = format.arithmetics(kind, dtype, device)
    if wanted not in here:
        raise refuse_arithmetic(format, kind, wanted, here)


def refuse_arithmetic(format: WeightFormat, kind: str, wanted: str, here: Sequence[str]) -> CheckpointUnrecognised:
    """The error for a way of computing that this machine does not have."""
    return CheckpointUnrecognised(
        f"The host computes with {format.name}/{kind} weights as {wanted[:80]!r}, which cannot be done here; possible: "
        f"{', '.join(here) or 'none'}.",
        hint="the same versions and the same kind of GPU on all machines, or unquantised weights",
    )
