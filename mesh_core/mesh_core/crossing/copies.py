"""Tensors recognised by their content where they are: private copies, compared bit by bit on the tensor's own device.

For tensors that nothing else identifies: in inference mode torch does not count changes, and a host may make the same
tensor anew for every step. Must not know what is remembered of a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mesh_core.crossing.sequences import MOST_SEQUENCES
from mesh_core.system.device import synchronise
from mesh_core.system.logs import logger

log = logger(__name__)

_LEAST = 1 << 16
"""Bytes from which comparing is faster than hashing."""

_SAMPLE = 4096
"""Words that are compared first, spread over the tensor: enough to tell most tensors apart, next to free."""

_Form = tuple[torch.dtype, torch.Size, torch.device]


@dataclass
class _Copy:
    bits: Tensor
    label: str
    step: int


class Copies:
    """Labels of tensors, by content. Used from one thread.

    A copy goes when as many steps as there are interleaved passes at most went by without it. What would go over the
    limit is not copied: passes that do not fit together would only push each other out.

    Args:
        limit: bytes of all copies together.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._step = 0
        self._copies: dict[_Form, list[_Copy]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of memory, on all devices together."""
        return sum(copy.bits.nbytes for copies in self._copies.values() for copy in copies)

    def next_step(self) -> None:
        """Drops what was not asked for in a while."""
        self._step += 1
        oldest = self._step - MOST_SEQUENCES
        kept = {form: [c for c in copies if c.step >= oldest] for form, copies in self._copies.items()}
        self._copies = {form: copies for form, copies in kept.items() if copies}

    def find(self, tensor: Tensor) -> str | None:
        """The label of the tensor that has the dtype, the shape, the device and every bit of this one."""
        alike = self._copies.get(_form(tensor))
        if alike is None:
            return None
        bits = _bits(tensor)
        # Passes take turns: the one longest ago is likely the next.
        for position, copy in enumerate(alike):
            if _equal(bits, copy.bits):
                copy.step = self._step
                alike.append(alike.pop(position))
                return copy.label
        return None

    def keep(self, tensor: Tensor, label: str) -> None:
        """Copy ``tensor``, a strided one that was not found, if that is worth it and there is room."""
        if tensor.nbytes < _LEAST or self.nbytes + tensor.nbytes > self._limit:
            return
        try:
            bits = _bits(tensor).clone()
        except torch.OutOfMemoryError as error:
            log.debug("a constant is not copied and will be hashed again: %s", error)
            return
        # Another stream may be the one that compares.
        synchronise(tensor.device)
        self._copies.setdefault(_form(tensor), []).append(_Copy(bits, label, self._step))

    def clear(self) -> None:
        """Give all memory back."""
        self._copies.clear()


def _form(tensor: Tensor) -> _Form:
    return tensor.dtype, tensor.shape, tensor.device


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of ``tensor`` in row-major order, [nbytes]: a view of a contiguous one."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _equal(bits: Tensor, copy: Tensor) -> bool:
    # As integers: a NaN is itself, and 0 is not -0.
    aligned = not (bits.data_ptr() % 8 or bits.storage_offset() % 8 or len(bits) % 8)
    word = torch.int64 if aligned else torch.uint8
    ours, theirs = bits.view(word), copy.view(word)
    apart = max(1, len(ours) // _SAMPLE)
    return _same(ours[::apart], theirs[::apart]) and _same(ours, theirs)


def _same(ours: Tensor, theirs: Tensor) -> bool:
    # On the CPU torch would wake all threads, and wait for them where other programs have the cores.
    return np.array_equal(ours.numpy(), theirs.numpy()) if ours.device.type == "cpu" else torch.equal(ours, theirs)
