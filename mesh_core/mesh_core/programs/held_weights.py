"""Weights as a host program holds them in memory: plain numbers, stored weights, or a class of its own for a format."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from mesh_core.errors import CheckpointUnrecognised, UnsupportedInput
from mesh_core.model.stored_weight import StoredWeight
from mesh_core.plugins.registry import Plugins

_YES = ("1", "true", "yes")
"""As diffusers reads its environment variables."""


def as_stored(name: str, tensor: Tensor, plugins: Plugins) -> Tensor:
    """The tensor itself where it is a plain or a stored one, else the stored weight that it is; shares its memory.

    Args:
        name: for the error.

    Raises:
        CheckpointUnrecognised: a tensor of another class than torch's own, which no format knows.
    """
    if type(tensor) in (Tensor, nn.Parameter, StoredWeight):
        return tensor
    for format in plugins.weight_formats().values():
        found = format.held(tensor)
        if isinstance(found, Tensor):
            return found
        if found is not None:
            kind, shape, parts = found
            arithmetic = format.arithmetics(kind, torch.bfloat16, tensor.device)
            return StoredWeight(format, kind, shape, torch.bfloat16, parts, next(iter(arithmetic), ""))
    raise CheckpointUnrecognised(
        f"{name} is a {type(tensor).__name__}, which is no plain tensor and in none of the formats that are read.",
        hint="the same model in bfloat16, or quantised in a format of docs/reference/weights.md",
    )


def is_gguf_layer(module: nn.Module) -> bool:
    """Whether it is diffusers' linear layer for GGUF weights."""
    kind = type(module)
    return kind.__name__ == "GGUFLinear" and kind.__module__.startswith("diffusers.")


def refuse_other_arithmetic(model: nn.Module) -> None:
    """Refuse layers of diffusers for GGUF weights that compute in another way than stages do.

    Raises:
        UnsupportedInput: names what differs.
    """
    dtype = model.dtype
    for name, module in cast("Iterator[tuple[str, Any]]", model.named_modules()):
        if not is_gguf_layer(module):
            continue
        if module.compute_dtype != dtype:
            raise UnsupportedInput(
                f"{name} computes in {module.compute_dtype} and the model in {dtype}; workers would compute in one.",
                hint=f"GGUFQuantizationConfig(compute_dtype={dtype})",
            )
        if module.weight.device.type == "cuda" and os.environ.get("DIFFUSERS_GGUF_CUDA_KERNELS", "").lower() in _YES:
            raise UnsupportedInput(
                "DIFFUSERS_GGUF_CUDA_KERNELS has this machine compute in another way than workers do.",
                hint="the same without that environment variable",
            )
