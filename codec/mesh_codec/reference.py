"""What a stream remembers of the tensor before: whole numbers, so that all ends and all engines agree on it exactly.

Must not know buffers or how symbols are coded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mesh_codec.base import Buffer
from mesh_codec.payload import Form
from mesh_codec.quantiser import Cut, Quantiser
from mesh_codec.symbols import RADIUS, Symbols

_FRACTION_BITS = 16
_FURTHEST = 64.0
"""Ratio of two steps beyond which symbols of one do not help to predict those of the other."""

_TOLERANCE = 1.2
"""Ratio of the step that a tensor asks for to the one in use up to which that is kept: a change of step costs bits,
because the old symbols lie between the new ones."""

_DIGEST_BYTES = 8


@dataclass
class Reference:
    """Attributes:
    form: of the tensors.
    order, means, step: as in `Quantiser`; order and means are those of the last key frame.
    symbols: int16 [channels, tokens], the last tensor, channels in that order.
    digest: of everything since the last key frame, as it was sent.
    """

    form: Form
    order: NDArray[np.int64]
    means: NDArray[np.float32]
    step: float
    symbols: Symbols
    digest: bytes = b""

    @classmethod
    def empty(cls, form: Form, order: NDArray[np.int64], means: NDArray[np.float32], step: float) -> Reference:
        """For a key frame. ``means``: float32 [channels], in the tensor's order."""
        shape = (len(order), form.elements // len(order))
        return cls(form, order, means[order, None], step, np.empty(shape, dtype=np.int16))

    @property
    def quantiser(self) -> Quantiser:
        """What turns elements into symbols like these, and back."""
        return Quantiser(self.form.dtype, self.order, self.means, self.step)

    def serves(self, form: Form, step: float) -> bool:
        """Whether a tensor that asks for ``step`` can be predicted from this one."""
        if self.form != form or not step or not self.step:
            return False
        return 1 / _FURTHEST <= self.step / step <= _FURTHEST

    def kept_step(self, wanted: float) -> float:
        """The step to use where ``wanted`` is asked for."""
        return self.step if 1 / _TOLERANCE <= wanted / self.step <= _TOLERANCE else wanted

    def rescaled(self, step: float, cuts: Sequence[Cut]) -> Reference:
        """A copy with the symbols in another ``step``, rounded to nearest. Exact on every machine: whole numbers only.

        What is coded next changes the copy, so that a stream can go back to this."""
        symbols = self.symbols.copy()
        if step != self.step:
            factor = round(self.step / step * (1 << _FRACTION_BITS))
            half = 1 << (_FRACTION_BITS - 1)
            for cut in cuts:
                scaled = (symbols[cut].astype(np.int64) * factor + half) >> _FRACTION_BITS
                symbols[cut] = np.clip(scaled, -RADIUS, RADIUS)
        return replace(self, step=step, symbols=symbols)


def chain(before: bytes, form: Form, step: float, buffers: Sequence[Buffer]) -> bytes:
    """The digest that names a tensor together with all that it was predicted from."""
    hasher = hashlib.blake2b(before, digest_size=_DIGEST_BYTES)
    hasher.update(f"{form.dtype.name} {list(form.shape)} {float(step).hex()}".encode())
    for buffer in buffers:
        hasher.update(memoryview(buffer).nbytes.to_bytes(8, "little"))
        hasher.update(buffer)
    return hasher.digest()
