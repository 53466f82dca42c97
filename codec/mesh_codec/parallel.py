"""Work on the pieces of a tensor side by side. Must not know what is done to them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

_THREADS = 4
"""Sixteen, on as many cores, encoded no faster than two: the steps between numpy calls wait for the interpreter."""


def new_pool(name: str) -> ThreadPoolExecutor:
    """As many threads as torch uses, but few."""
    return ThreadPoolExecutor(min(_THREADS, torch.get_num_threads()), thread_name_prefix=f"mesh-{name}")
