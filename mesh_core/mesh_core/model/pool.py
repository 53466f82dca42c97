"""Parameters shared between the stages of one process."""

from __future__ import annotations

import threading
import weakref

import torch
from torch import nn

PoolKey = tuple[str, str, torch.device, torch.dtype, str]
"""Fingerprint of the model, name of the parameter, where and as what it is held, and how it is computed with where it
stays as it is stored."""


class ParameterPool:
    """The parameters that live in this process, so that stages which overlap share them. Thread-safe.

    Holds them weakly: a parameter is freed with the last stage that uses it.
    """

    def __init__(self) -> None:
        self._held: weakref.WeakValueDictionary[PoolKey, nn.Parameter] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def get(self, key: PoolKey) -> nn.Parameter | None:
        """The parameter, if a stage still uses it."""
        with self._lock:
            return self._held.get(key)

    def put(self, key: PoolKey, value: nn.Parameter) -> None:
        """Let later stages find it for as long as its own stage uses it."""
        with self._lock:
            self._held[key] = value

    def nbytes(self, device: torch.device) -> int:
        """Bytes of all parameters on ``device``."""
        with self._lock:
            return sum(p.nbytes for key, p in self._held.items() if key[2] == device)
