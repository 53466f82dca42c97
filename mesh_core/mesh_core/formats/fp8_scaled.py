"""Weights of 8-bit floats with one scale each, as ComfyUI has them; see `mesh_core.formats.fp8_scaled_layouts`.

comfy-kitchen, which ComfyUI computes with, has two ways of doing each thing. In its plain one, which runs everywhere,
the scale is rounded to the type that is computed in and multiplied with in that type (``kitchen/...``). Its CUDA
kernels multiply and divide in float32 and round once (``kitchen-cuda/...``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from mesh_core.errors import CheckpointUnrecognised
from mesh_core.formats import float8, fp8_scaled_layouts, fused
from mesh_core.formats.arithmetic import in_type, way_and_type
from mesh_core.formats.float8 import E4M3, E4M3_MAX, E5M2, checked_codes, checked_scales
from mesh_core.formats.fp8_scaled_layouts import FULL
from mesh_core.model.stored import Claim, Header, Parts, StoredTensor, WeightFormat, check_arithmetic

DEQUANT = "kitchen/fp8-dequant"
DEQUANT_ONCE = "kitchen-cuda/fp8-dequant"
MATMUL = "kitchen/fp8-mm"
MATMUL_ONCE = "kitchen-cuda/fp8-mm"

_DEQUANT_OF = {DEQUANT: DEQUANT, MATMUL: DEQUANT, DEQUANT_ONCE: DEQUANT_ONCE, MATMUL_ONCE: DEQUANT_ONCE}
"""By way of computing, how it makes numbers where the weight is not multiplied with as it is."""

_MATMUL_TYPES = (torch.bfloat16, torch.float16)

_MULTIPLE = 16
"""Rows and columns of a weight that a card multiplies with."""


class Fp8ScaledFormat(WeightFormat):
    """Kinds ``F8_E4M3``, ``F8_E4M3-full`` (the file forbids to quantise inputs) and ``F8_E5M2``.

    Parts: ``codes`` [rows, columns], ``scale`` F32 [1], and of ``F8_E4M3`` the ``input_scale`` F32 [1], which is 1
    where the file has none, as in ComfyUI.
    """

    name = "fp8-scaled"

    def claim(self, header: Header) -> Claim:
        """Layers that a marker names, new or old."""
        return fp8_scaled_layouts.claim(self, header)

    def in_memory(self, stored: StoredTensor, parts: Parts, start: int, stop: int) -> dict[str, Tensor]:
        """The same from both markings."""
        made = {
            "codes": checked_codes(stored, parts["codes"]),
            "scale": checked_scales(stored, "scale", parts["scale"], 1),
        }
        if stored.kind == E4M3:
            found = parts.get("input_scale")
            made["input_scale"] = torch.ones(1) if found is None else checked_scales(stored, "input_scale", found, 1)
        return made

    def join(self, pieces: Sequence[Parts]) -> dict[str, Tensor]:
        """Of equal scales alone: no kernel takes several."""
        first = pieces[0]
        for piece in pieces[1:]:
            if any(not torch.equal(piece[role], first[role]) for role in first if role != "codes"):
                raise CheckpointUnrecognised(
                    "Weights with different scales (fp8-scaled) would have to become one weight.",
                    hint="a file in which the fused layers are quantised as one, or a bfloat16 copy of the model",
                )
        return {**first, "codes": torch.cat([piece["codes"] for piece in pieces])}

    def nbytes(self, stored: StoredTensor, rows: int) -> int:
        """One for each number, and the scales."""
        return rows * stored.shape[1] + (8 if stored.kind == E4M3 else 4)

    def arithmetics(self, kind: str, dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
        """Dequantising; and where cards multiply 8-bit floats, doing so, with the inputs quantised by `input_scale`."""
        if kind not in (E4M3, E5M2, FULL):
            return ()
        matmul = kind == E4M3 and dtype in _MATMUL_TYPES and float8.multiplies(device)
        ways = (DEQUANT, MATMUL, DEQUANT_ONCE, MATMUL_ONCE) if matmul else (DEQUANT, DEQUANT_ONCE)
        return in_type(ways, dtype)

    def dequantise(
        self, parts: Parts, kind: str, shape: tuple[int, ...], dtype: torch.dtype, arithmetic: str
    ) -> Tensor:
        """As comfy-kitchen does; also of a weight that is multiplied with as it is."""
        codes = parts["codes"]
        way, made_in = way_and_type(self, kind, arithmetic, _DEQUANT_OF, dtype, codes.device)
        return _numbers(codes, parts["scale"], made_in, _DEQUANT_OF[way]).to(dtype)

    def linear(
        self,
        x: Tensor,
        parts: Parts,
        kind: str,
        shape: tuple[int, ...],
        bias: Tensor | None,
        arithmetic: str,
    ) -> Tensor:
        """With ``x`` of two or three dimensions quantised, where the arithmetic says so; else dequantised first.

        Raises:
            CheckpointUnrecognised: this machine does not compute so.
        """
        way, made_in = way_and_type(self, kind, arithmetic, _DEQUANT_OF, x.dtype, x.device)
        if way not in (MATMUL, MATMUL_ONCE) or x.dtype != made_in or x.dim() not in (2, 3):
            return super().linear(x, parts, kind, shape, bias, arithmetic)
        check_arithmetic(self, kind, arithmetic, x.dtype, x.device)
        return multiplied(x, parts, bias, way)

    def transient(self, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Of the way that takes most."""
        return float8.transient((shape[0], shape[1]), dtype)


def multiplied(x: Tensor, parts: Parts, bias: Tensor | None, way: str) -> Tensor:
    """``x`` [..., columns], quantised, times a weight as it is stored, [..., rows] in the type of ``x``.

    Where the card takes no such rows and columns, both are dequantised.
    """
    codes, scale, input_scale = parts["codes"], parts["scale"], parts["input_scale"]
    rows = _quantised(x.reshape(-1, codes.shape[1]), input_scale, way)
    bias = None if bias is None else bias.to(x.dtype)
    if any(size % _MULTIPLE for size in codes.shape):
        dequant = _DEQUANT_OF[way]
        inputs = _numbers(rows, input_scale, x.dtype, dequant)
        made = linear(inputs, _numbers(codes, scale, x.dtype, dequant), bias)
    else:
        made = torch._scaled_mm(
            rows, codes.t(), scale_a=input_scale, scale_b=scale, bias=bias, out_dtype=x.dtype, use_fast_accum=False
        )
    return made.reshape(*x.shape[:-1], codes.shape[0])


def _numbers(codes: Tensor, scale: Tensor, dtype: torch.dtype, way: str) -> Tensor:
    parts, shape = {"codes": codes, "scale": scale}, tuple(codes.shape)
    if way == DEQUANT_ONCE:
        return fused.numbers("fp8-once", parts, shape, dtype, partial(float8.in_float32, dtype=dtype))
    return fused.numbers("fp8", parts, shape, dtype, lambda some: some["codes"].to(dtype).mul_(some["scale"].to(dtype)))


def _quantised(x: Tensor, scale: Tensor, way: str) -> Tensor:
    """Contiguous. Numbers beyond what the type has become its largest."""
    scaled = x.to(torch.float32) / scale if way == MATMUL_ONCE else x * (1.0 / scale).to(x.dtype)
    return scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).contiguous()
