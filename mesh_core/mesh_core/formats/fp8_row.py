"""Weights of 8-bit floats with a scale for each row, ``fp8r``, as Black Forest Labs writes and diffusers reads them.

No marker names them: ``X.weight`` F8_E4M3 [rows, columns] and ``X.weight_scale`` F32 [rows] are all that diffusers
looks at.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from mesh_core.errors import CheckpointCorrupt
from mesh_core.formats import float8, fused
from mesh_core.formats.arithmetic import in_type, way_and_type
from mesh_core.formats.companions import SCALAR
from mesh_core.formats.float8 import E4M3, E4M3_MAX, checked_codes, checked_scales
from mesh_core.formats.markers import bfl_config, marked_layers
from mesh_core.model.stored import Claim, Header, Parts, StoredTensor, WeightFormat, check_arithmetic

DEQUANT = "diffusers/fp8r-dequant"
"""In float32, rounded once."""

MATMUL = "diffusers/fp8r-mm"
"""Inputs are quantised by row with the scale that fits each, and multiplied with the weight as it is."""

_SMALLEST_SCALE = 1e-12
"""Of inputs; diffusers'."""

_MULTIPLE = 16
"""Rows and columns of a weight that a card multiplies with."""

_SUFFIX = ".weight_scale"


class Fp8RowFormat(WeightFormat):
    """Kind ``F8_E4M3``. Parts: ``codes`` [rows, columns], ``scale`` F32 [rows]."""

    name = "fp8-row"

    rows_in_file = frozenset({"codes", "scale"})

    def claim(self, header: Header) -> Claim:
        """Weights of more than one row that no marker names; of one row, it could be a scale of the whole weight."""
        tensors: dict[str, StoredTensor] = {}
        markers: set[str] = set()
        marked = None
        for name, scale in header.tensors.items():
            layer = name.removesuffix(_SUFFIX)
            weight = header.tensors.get(f"{layer}.weight")
            if layer == name or weight is None or weight.dtype != E4M3 or f"{name}_2" in header.tensors:
                continue
            if scale.dtype != "F32" or len(scale.shape) != 1 or scale.shape == (1,):
                continue
            marked = marked or marked_layers(header)
            if layer in marked.layers:
                continue
            if len(weight.shape) != 2 or scale.shape != weight.shape[:1]:
                raise CheckpointCorrupt(
                    f"{header.path}: {name} has {scale.shape[0]} scales for a weight of shape {list(weight.shape)}; "
                    "one for each row is expected."
                )
            tensors[weight.name] = StoredTensor(self, E4M3, weight.shape, {"codes": weight, "scale": scale})
            inputs = header.tensors.get(f"{layer}.input_scale")
            if inputs is not None and inputs.dtype == "F32" and inputs.shape in SCALAR:
                # diffusers leaves it aside.
                markers.add(inputs.name)
        if not tensors:
            return Claim()
        _refuse_without_scales(header, tensors)
        return Claim(tensors, frozenset(markers), config=bfl_config(header))

    def in_memory(self, stored: StoredTensor, parts: Parts, start: int, stop: int) -> dict[str, Tensor]:
        """As in the file."""
        return {
            "codes": checked_codes(stored, parts["codes"]),
            "scale": checked_scales(stored, "scale", parts["scale"], stop - start),
        }

    def nbytes(self, stored: StoredTensor, rows: int) -> int:
        """One for each number, and four for each row."""
        return rows * (stored.shape[1] + 4)

    def arithmetics(self, kind: str, dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
        """Dequantising; and where cards multiply 8-bit floats, doing so."""
        if kind != E4M3:
            return ()
        return in_type((DEQUANT, MATMUL) if float8.multiplies(device) else (DEQUANT,), dtype)

    def dequantise(
        self, parts: Parts, kind: str, shape: tuple[int, ...], dtype: torch.dtype, arithmetic: str
    ) -> Tensor:
        """As diffusers does; also of a weight that is multiplied with as it is."""
        codes = parts["codes"]
        _, made_in = way_and_type(self, kind, arithmetic, (DEQUANT, MATMUL), dtype, codes.device)
        plain = partial(float8.in_float32, dtype=made_in)
        return fused.numbers("fp8-once", parts, shape, made_in, plain).to(dtype)

    def linear(
        self,
        x: Tensor,
        parts: Parts,
        kind: str,
        shape: tuple[int, ...],
        bias: Tensor | None,
        arithmetic: str,
    ) -> Tensor:
        """With ``x`` quantised where the arithmetic says so and the weight has rows and columns for it.

        Raises:
            CheckpointUnrecognised: this machine does not compute so.
        """
        way, made_in = way_and_type(self, kind, arithmetic, (DEQUANT, MATMUL), x.dtype, x.device)
        if way != MATMUL or x.dtype != made_in or any(size % _MULTIPLE for size in shape):
            return super().linear(x, parts, kind, shape, bias, arithmetic)
        check_arithmetic(self, kind, arithmetic, x.dtype, x.device)
        return multiplied(x, parts, bias)

    def transient(self, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """The numbers, and some of them in float32."""
        return float8.transient((shape[0], shape[1]), dtype)


def multiplied(x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """``x`` [..., columns], quantised by row, times a weight as it is stored, [..., rows] in the type of ``x``.

    The product is in bfloat16 whatever ``x`` is; the bias is added to it in the type of ``x``.
    """
    codes = parts["codes"]
    rows = x.reshape(-1, codes.shape[1]).to(torch.float32)
    scale = (rows.abs().amax(dim=1, keepdim=True) / E4M3_MAX).clamp(min=_SMALLEST_SCALE)
    inputs = (rows / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    made = torch._scaled_mm(
        inputs, codes.t(), scale, parts["scale"][None, :], out_dtype=torch.bfloat16, use_fast_accum=True
    )
    made = made.reshape(*x.shape[:-1], codes.shape[0]).to(x.dtype)
    return made if bias is None else made + bias


def _refuse_without_scales(header: Header, scaled: Mapping[str, StoredTensor]) -> None:
    """Nothing names this format: where some matrices have scales, one without has lost them.

    Raises:
        CheckpointCorrupt: names the first.
    """
    marked = marked_layers(header).layers
    for name, info in header.tensors.items():
        layer = name.removesuffix(".weight")
        bare = info.dtype == E4M3 and len(info.shape) == 2 and name not in scaled and layer != name
        if bare and layer not in marked and f"{layer}{_SUFFIX}" not in header.tensors:
            raise CheckpointCorrupt(
                f"{header.path}: {name} is in 8-bit floats without scales, where {min(scaled)} has one for each row.",
                hint="copy or download it again; a file in one format",
            )
