"""Whether kernels make the bits of plain torch: every format, arithmetic and type, with scales of all magnitudes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.quantised.parts import LABELS, random_parts
from mesh_core.builtin import installed_plugins
from mesh_core.formats import fused
from mesh_core.model.stored import format_of

_SHAPES = ((512, 2048), (67, 768))
_TYPES = (torch.bfloat16, torch.float16, torch.float32)


@contextmanager
def plain_torch() -> Iterator[None]:
    """Without kernels."""
    asked, fused._on_gpu = fused._on_gpu, lambda codes: False
    try:
        yield
    finally:
        fused._on_gpu = asked


def compared(device: torch.device, shapes: tuple[tuple[int, int], ...] = _SHAPES) -> list[dict[str, Any]]:
    """For each case, how many numbers were compared and how many of them differ in a bit. NaN is like any NaN."""
    formats, rows = installed_plugins().weight_formats(), []
    for label in LABELS:
        format, kind = format_of(label, formats)
        for shape in shapes:
            parts = random_parts(label, *shape, device, spread=True)
            for dtype in _TYPES:
                # One name for each way of making numbers; matrix units dequantise as one of these does.
                for arithmetic in (n for n in format.arithmetics(kind, dtype, device) if "-mm/" not in n):
                    made = format.dequantise(parts, kind, shape, dtype, arithmetic)
                    with plain_torch():
                        expected = format.dequantise(parts, kind, shape, dtype, arithmetic)
                    rows.append(
                        {
                            "label": label,
                            "arithmetic": arithmetic,
                            "dtype": str(dtype).removeprefix("torch."),
                            "numbers": made.numel(),
                            "different": int((~fused.same_bits(made, expected)).sum()),
                        }
                    )
    return rows


def refused() -> list[str]:
    """The kernels that were tried and are not used."""
    return [str(key[:3]) for key, works in fused._works.items() if not works]
