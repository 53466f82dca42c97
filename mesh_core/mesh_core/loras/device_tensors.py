"""The tensors of LoRAs that are computed with at every step: on the device, once for all that use the same."""

from __future__ import annotations

from math import prod

import torch
from torch import nn

from mesh_codec.dtypes import from_safetensors
from mesh_core.loras.tensors import Source, check_finite
from mesh_core.model.pool import ParameterPool, PoolKey

Held = tuple[Source, torch.dtype | None]
"""A LoRA's tensor, and in which type it is held; None for its own."""


def key_on(device: torch.device, held: Held) -> PoolKey:
    """Under which a LoRA's tensor is shared. May have to read its file, once."""
    source, dtype = held
    name = f"{source.digest()} {source.dtype} {list(source.shape)}"
    return "lora", name, device, dtype or from_safetensors(source.dtype).torch, ""


def bytes_of(held: Held) -> int:
    """What it takes."""
    source, dtype = held
    return source.nbytes if dtype is None else prod(source.shape) * dtype.itemsize


def hold_on(device: torch.device, held: Held, pool: ParameterPool, what: str) -> nn.Parameter:
    """The tensor on ``device``: that in ``pool``, which has it from then on.

    Raises:
        LoraError: the file changed, or ``what`` holds values that are not finite.
    """
    key = key_on(device, held)
    found = pool.get(key)
    if found is None:
        tensor = held[0].load()
        check_finite(tensor, what)
        found = nn.Parameter(tensor.to(device).to(key[3]), requires_grad=False)
        pool.put(key, found)
    return found
