"""The tensors of LoRAs that are computed with at every step: on the device, once for all that use the same."""

from __future__ import annotations

import torch
from torch import nn

from mesh_codec.dtypes import from_safetensors
from mesh_core.loras.tensors import Source, check_finite
from mesh_core.model.pool import ParameterPool, PoolKey


def key_on(device: torch.device, source: Source) -> PoolKey:
    """Under which a LoRA's tensor is shared. May have to read its file, once."""
    name = f"{source.digest()} {list(source.shape)}"
    return "lora", name, device, from_safetensors(source.dtype).torch, ""


def hold_on(device: torch.device, source: Source, pool: ParameterPool, what: str) -> nn.Parameter:
    """The tensor in its own type on ``device``: that in ``pool``, which has it from then on.

    Raises:
        LoraError: the file changed, or ``what`` holds values that are not finite.
    """
    key = key_on(device, source)
    held = pool.get(key)
    if held is None:
        tensor = source.load()
        check_finite(tensor, what)
        held = nn.Parameter(tensor.to(device), requires_grad=False)
        pool.put(key, held)
    return held
