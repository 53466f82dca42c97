"""Random stored weights as they lie in memory, made where they are needed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mesh_core.formats.gguf import _SCALES, _TYPES

BYTES_OF_A_BLOCK: Mapping[str, int] = {kind: _TYPES[kind].block_bytes for kind in _SCALES}

LABELS = (
    "fp8-scaled/F8_E4M3",
    "fp8-scaled/F8_E5M2",
    "fp8-cast/F8_E4M3",
    "fp8-cast/F8_E5M2",
    "fp8-row/F8_E4M3",
    "nvfp4/E2M1",
    *(f"gguf/{kind}" for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")),
)
"""Of the formats and kinds that are dequantised by kernels."""


def random_parts(
    label: str, rows: int, columns: int, device: torch.device | str, spread: bool = False
) -> dict[str, Tensor]:
    """Parts of a weight whose numbers have a deviation near one over the root of ``columns``.

    Args:
        spread: scales of all magnitudes instead, and the bytes of float8 in turn, so that each is there.
    """
    generator = torch.Generator(device).manual_seed(rows * 7 + columns)
    format, _, kind = label.partition("/")
    if format == "gguf":
        return {"codes": _blocks(kind, rows, columns, generator, spread)}
    if format == "nvfp4":
        codes = _bytes((rows, columns // 2), generator)
        blocks = torch.randint(0, 0x7F, (rows, columns // 16), generator=generator, device=device, dtype=torch.uint8)
        scale = _scales((rows,), generator, spread) / 100
        return {"codes": codes, "block_scales": blocks.view(torch.float8_e4m3fn), "scale": scale}
    numbers = torch.float8_e4m3fn if kind == "F8_E4M3" else torch.float8_e5m2
    if spread:
        codes = (torch.arange(rows * columns, device=device) % 256).to(torch.uint8).view(rows, columns).view(numbers)
    else:
        codes = torch.empty(rows, columns, dtype=numbers, device=device)
        for some in codes.split(1024):
            some.copy_(torch.randn(some.shape, generator=generator, device=device).to(torch.bfloat16))
    parts = {"codes": codes}
    if format != "fp8-cast":
        parts["scale"] = _scales((rows if format == "fp8-row" else 1,), generator, spread) / columns**0.5
    if label == "fp8-scaled/F8_E4M3":
        parts["input_scale"] = torch.ones(1, device=device)
    return parts


def _bytes(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, shape, generator=generator, device=generator.device, dtype=torch.uint8)


def _scales(shape: tuple[int, ...], generator: torch.Generator, spread: bool) -> Tensor:
    made = torch.rand(shape, generator=generator, device=generator.device) + 0.5
    exponents = torch.linspace(-40, 30, made.numel(), device=made.device).view(shape)
    return made * torch.exp2(exponents) if spread and made.numel() > 1 else made


def _blocks(kind: str, rows: int, columns: int, generator: torch.Generator, spread: bool) -> Tensor:
    size, numbers = BYTES_OF_A_BLOCK[kind], _TYPES[kind].block_size
    blocks = _bytes((rows * columns // numbers, size), generator)
    for at in _SCALES[kind]:
        scales = torch.randn(len(blocks), generator=generator, device=blocks.device)
        if spread:
            scales *= torch.exp2(torch.linspace(-26, 7, len(blocks), device=blocks.device))
        else:
            scales *= 0.1 / 8 / columns**0.5
        blocks[:, at : at + 2] = scales.half()[:, None].view(torch.uint8)
    return blocks.view(rows, -1)
