"""Milliseconds of a linear layer: in bfloat16, and of a stored weight, dequantised first or on matrix units."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.quantised.exactness import plain_torch
from benchmarks.quantised.parts import random_parts
from mesh_core.builtin import installed_plugins
from mesh_core.model.stored import format_of

SHAPES = ((36864, 6144), (6144, 18432), (18432, 6144), (6144, 6144), (55296, 6144), (6144, 24576))
"""[rows, columns] of FLUX.2 Dev's layers: MLP in, MLP out, query-key-value, projection, single block in, out."""

TIMED = (
    "fp8-scaled/F8_E4M3",
    "fp8-cast/F8_E4M3",
    "fp8-row/F8_E4M3",
    "nvfp4/E2M1",
    "gguf/Q8_0",
    "gguf/Q4_K",
    "gguf/Q6_K",
)

_REPEATS, _WARM = 10, 3


def measured(
    tokens: int, shapes: tuple[tuple[int, int], ...], labels: tuple[str, ...], device: torch.device
) -> list[dict[str, Any]]:
    """A row for each shape and label."""
    rows = []
    for shape in shapes:
        x = torch.randn(tokens, shape[1], device=device, dtype=torch.bfloat16)
        dense = torch.randn(shape, device=device, dtype=torch.bfloat16) / shape[1] ** 0.5
        bf16_ms = milliseconds(partial(linear, x, dense), device)
        del dense
        for label in labels:
            row = {"label": label, "rows": shape[0], "columns": shape[1], "bf16_ms": bf16_ms}
            row |= _stored(x, label, shape, device)
            row["of_bf16"] = row["kernel_ms"] / bf16_ms
            rows.append(row)
            print(row, flush=True)
    return rows


def _stored(x: Tensor, label: str, shape: tuple[int, int], device: torch.device) -> dict[str, Any]:
    format, kind = format_of(label, installed_plugins().weight_formats())
    parts = random_parts(label, *shape, device)
    names = format.arithmetics(kind, torch.bfloat16, device)
    units = next((name for name in names if "-mm/" in name), None)
    dequantised = partial(format.linear, x, parts, kind, shape, None, names[0])
    with plain_torch():
        torch_ms = milliseconds(dequantised, device)
    return {
        "torch_ms": torch_ms,
        "kernel_ms": milliseconds(dequantised, device),
        "dequantise_ms": milliseconds(partial(format.dequantise, parts, kind, shape, torch.bfloat16, names[0]), device),
        "units_ms": units and milliseconds(partial(format.linear, x, parts, kind, shape, None, units), device),
    }


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """The median of one call among several, by the device's own clock where it has one."""
    times = []
    for _ in range(_WARM):
        run()
    for _ in range(_REPEATS):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            began = perf_counter()
            run()
            times.append((perf_counter() - began) * 1e3)
    return median(times)
