"""int8 as ComfyUI (comfy-kitchen) writes it: one scale for the weight or one per row, and perhaps rotated.

A rotated weight (convrot) has each group of columns, 256 if the marker names no other number, multiplied by an
orthogonal Hadamard matrix, which spreads large values over the group. Only the marker says whether it is. In memory:

    codes   [rows, columns] int8
    scale   [rows] float32
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mesh_core.errors import CheckpointCorrupt
from mesh_core.formats.arithmetic import in_type, way_and_type
from mesh_core.formats.companions import SCALAR, claim_layers, companion, matrix, row_scales
from mesh_core.formats.float8 import AT_ONCE
from mesh_core.formats.markers import Option, marked_layers
from mesh_core.model.stored import Claim, Header, Parts, StoredTensor, WeightFormat

KITCHEN = "kitchen/int8-dequant"
"""comfy-kitchen's: in float32, rounded once."""

CONVROT = "kitchen/int8-convrot-dequant"
"""Likewise, and rotated back in float32 before it is rounded."""

_MARKER = "int8_tensorwise"
_GROUPS = (4, 16, 64, 256, 1024)
"""Columns that are rotated together: powers of 4."""

_DEFAULT_GROUP = 256
_ROTATED = "I8_ROT"
_rotations: dict[tuple[int, torch.device], Tensor] = {}


class Int8Format(WeightFormat):
    """Kinds: ``I8``, and ``I8_ROT256`` and the like for weights that are rotated in groups of so many columns."""

    name = "int8"

    def claim(self, header: Header) -> Claim:
        """Layers that a marker of ComfyUI calls int8_tensorwise, whether they have one scale or one per row."""
        marked = marked_layers(header)
        layers = {layer: self._stored(header, layer, said.options) for layer, said in marked.of(_MARKER).items()}
        return claim_layers(header, marked, layers)

    def in_memory(self, stored: StoredTensor, parts: Parts, start: int, stop: int) -> dict[str, Tensor]:
        """A scale of the whole weight becomes one per row."""
        return {"codes": parts["codes"], "scale": row_scales(stored, parts["scale"], start, stop)}

    def nbytes(self, stored: StoredTensor, rows: int) -> int:
        """Codes, and four bytes for each row."""
        return rows * (stored.shape[1] + 4)

    def arithmetics(self, kind: str, dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
        """comfy-kitchen's dequantisation, everywhere. Matrix units for integers are not used."""
        return in_type(_ways(kind), dtype)

    def dequantise(
        self, parts: Parts, kind: str, shape: tuple[int, ...], dtype: torch.dtype, arithmetic: str
    ) -> Tensor:
        """Every code is a number of the type as well: one product in place, made in float32; rotated in float32."""
        codes, scale = parts["codes"], parts["scale"]
        way, made_in = way_and_type(self, kind, arithmetic, _ways(kind), dtype, codes.device)
        if way == KITCHEN:
            return codes.to(made_in).mul_(scale[:, None]).to(dtype)
        back, groups = rotation(_group(kind), codes.device).T, codes.shape[1] // _group(kind)
        numbers = torch.empty(codes.shape, dtype=made_in, device=codes.device)
        step = _rows_at_once(shape)
        for start in range(0, shape[0], step):
            some = slice(start, start + step)
            rotated = codes[some].float().mul_(scale[some, None]).view(-1, groups, len(back))
            numbers[some] = torch.matmul(rotated, back).view(-1, codes.shape[1])
        return numbers.to(dtype)

    def transient(self, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """The numbers; of rotated ones, some of them twice in float32 besides."""
        at_once = 0 if kind == "I8" else _rows_at_once(shape)
        return shape[0] * shape[1] * dtype.itemsize + at_once * shape[1] * 8

    def _stored(self, header: Header, layer: str, options: Mapping[str, Option]) -> StoredTensor:
        codes = matrix(header, f"{layer}.weight", "I8", 1)
        rows, columns = codes.shape
        one, by_rows = SCALAR, ((rows, 1), (rows,))
        said = options.get("per_row")
        shapes = (*one, *by_rows) if said is None else by_rows if said else one
        scale = companion(header, f"{layer}.weight_scale", ("F32",), shapes)
        kind = "I8"
        if options.get("convrot"):
            group = options.get("convrot_groupsize", _DEFAULT_GROUP)
            if not isinstance(group, int) or group not in _GROUPS or columns % group:
                raise CheckpointCorrupt(
                    f"{header.path}: the marker of {layer} says that groups of {group} columns are rotated; there are "
                    f"{columns}, and a group is one of {', '.join(map(str, _GROUPS))}."
                )
            kind = f"{_ROTATED}{group}"
        return StoredTensor(self, kind, (rows, columns), {"codes": codes, "scale": scale})


def rotation(group: int, device: torch.device) -> Tensor:
    """The regular Hadamard matrix of a power of 4, [group, group] float32, symmetric and its own inverse."""
    found = _rotations.get((group, device))
    if found is None:
        four = 1 - 2 * torch.eye(4).flip(0)
        found = torch.ones(1, 1)
        while found.shape[0] < group:
            found = torch.kron(found, four)
        found = _rotations[group, device] = (found / group**0.5).to(device)
    return found


def _group(kind: str) -> int:
    digits = kind.removeprefix(_ROTATED)
    return int(digits) if digits.isdecimal() and len(digits) < 5 else 0


def _rows_at_once(shape: tuple[int, ...]) -> int:
    """Of parts of one size: a product of one row alone may be added up in another order."""
    parts = max(1, -(-shape[0] * shape[1] // AT_ONCE))
    return max(1, -(-shape[0] // parts))


def _ways(kind: str) -> tuple[str, ...]:
    return (KITCHEN,) if kind == "I8" else (CONVROT,) if _group(kind) in _GROUPS else ()
