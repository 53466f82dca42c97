"""Work on the pieces of a tensor side by side. Must not know what is done to them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_THREADS = 4
"""Sixteen, on as many cores, encoded no faster than two: the steps between numpy calls wait for the interpreter."""


class ForkedPool(ThreadPoolExecutor):
    """A pool that starts threads of its own in a process that was forked: those of its parent are not there."""

    def __init__(self, threads: int, name: str) -> None:
        super().__init__(threads, thread_name_prefix=f"mesh-{name}")
        self._made = threads, name
        self._process = os.getpid()

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        if os.getpid() != self._process:
            ForkedPool.__init__(self, *self._made)
        return super().submit(*args, **kwargs)


def new_pool(name: str) -> ThreadPoolExecutor:
    """As many threads as torch uses, but few."""
    return ForkedPool(min(_THREADS, torch.get_num_threads()), name)
