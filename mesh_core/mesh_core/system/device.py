"""The few things that differ between devices."""

from __future__ import annotations

from functools import cache
from time import perf_counter

import psutil
import torch

from mesh_core.errors import ConfigError

_SHARE_OF_FREE = 0.9
"""Part of the memory free now that an automatic budget uses."""


def default_device() -> torch.device:
    """CUDA (or ROCm, which torch calls the same) where there is one, then Apple's GPU, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def checked_device(text: str) -> torch.device:
    """``text`` as a device that torch can use here.

    Raises:
        ConfigError: it is no device, or this machine does not have it.
    """
    try:
        found = torch.empty(0, device=text).device
        if found.type == "meta":
            raise NotImplementedError("it holds no numbers.")
        return found
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"Device {text!r} cannot be used: {reason}", hint="cpu, cuda or cuda:1; mesh doctor"
        ) from error


def synchronise(device: torch.device) -> None:
    """Wait until the work queued on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def free_memory(device: torch.device) -> int:
    """Bytes for weights when the user names no budget: a share of what is free now on ``device``."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _SHARE_OF_FREE)
    return int(psutil.virtual_memory().available * _SHARE_OF_FREE)


def spare_memory(device: torch.device) -> int:
    """Bytes that computing may take on ``device`` now, those included that torch holds and does not use."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return free_memory(device) + held


@cache
def peak_operations(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations per second that a product of matrices of ``dtype`` reaches on ``device``."""
    size = 512 if device.type == "cpu" else 4096
    matrix = torch.ones(size, size, dtype=dtype, device=device)

    def seconds() -> float:
        synchronise(device)
        began = perf_counter()
        torch.mm(matrix, matrix)
        synchronise(device)
        return perf_counter() - began

    return float(2 * size**3 / min(seconds() for _ in range(5)))


def label(device: torch.device) -> str:
    """What the device is called by its maker."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
