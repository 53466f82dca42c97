"""What a step would take of a worker, from the shapes that its header announces: looked at before anything is decoded.

A coded tensor says nothing of its size: a few KB may become gigabytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from mesh_codec.base import DecodeLimits
from mesh_codec.payload import Form, read_form
from mesh_core.errors import PlanDoesNotFit, TransportTimeout, WireMalformed
from mesh_core.model.library import Checkpoint
from mesh_core.model.shapes import resolve
from mesh_core.model.spans import BlockSpan
from mesh_core.system.device import peak_operations, spare_memory

_FUSED = ("cuda", "cpu")
"""Devices on which torch computes attention without ever holding the matrix of all tokens by all tokens."""

_HOPELESS = 4.0
"""Times its deadline that a step must take, at the device's peak, to be refused: the estimate is a rough one."""

_QUICK = 1e12
"""Operations of a step that any device can do: not worth finding out how fast this one is."""


_REMEMBERED = 16
"""Kinds of step that need not be judged again: passes of a generation differ in their texts."""


def decode_limits(memory: int | None) -> DecodeLimits:
    """What a decoder may make of one tensor where a step may take ``memory`` bytes, see `StepBounds`."""
    usual = DecodeLimits()
    return usual if memory is None else replace(usual, max_bytes=min(usual.max_bytes, memory))


class StepBounds:
    """Judges the steps of one stage. The estimates are low: what they refuse cannot work.

    Args:
        dtype: that the stage computes in.
        memory: bytes that a step may take; None for what is free when it comes.
    """

    def __init__(
        self, checkpoint: Checkpoint, span: BlockSpan, dtype: torch.dtype, device: torch.device, memory: int | None
    ) -> None:
        spec = checkpoint.spec
        self._roles = spec.states[span.start]
        self._described = checkpoint.adapter.shapes(spec, span.start)
        self._dtype, self._device, self._memory, self._blocks = dtype, device, memory, len(span)
        layers = [p.shape for p in spec.parameters_of(span).values() if len(p.shape) == 2]
        self._widest = max((rows for rows, _ in layers), default=0)
        self._width = Counter(columns for _, columns in layers).most_common(1)[0][0] if layers else 0
        self._weights = sum(prod(shape) for shape in layers)
        self._passed: set[object] = set()

    def check(self, entries: Sequence[Mapping[str, Any]], constants: Mapping[str, Tensor], seconds: float) -> None:
        """Whether a step may be decoded and computed.

        Args:
            entries: of its coded tensors.
            constants: that it is computed with.
            seconds: that it may take.

        Raises:
            CodecCorrupt: a header that announces no tensor.
            WireMalformed: tensors of types or shapes that the stage cannot compute with.
            PlanDoesNotFit: it takes more memory than there is.
            TransportTimeout: it cannot be done in time.
        """
        forms = {entry["n"]: read_form(entry["h"], DecodeLimits()) for entry in entries}
        asked = (
            tuple((name, form.dtype.name, form.shape) for name, form in forms.items()),
            tuple((name, tensor.dtype, tensor.shape) for name, tensor in constants.items()),
            seconds,
        )
        if asked in self._passed:  # as a step before it, which was computed
            return
        for name, form in forms.items():
            if self._roles.get(name) != "exact" and not form.dtype.lossy:
                raise WireMalformed(f"{name} came as {form.dtype.name}; no model computes in that.")
        shapes = {name: form.shape for name, form in forms.items()}
        resolved = resolve(self._described, {**{n: tuple(t.shape) for n, t in constants.items()}, **shapes})
        # Streams and texts have a batch, tokens and channels; beside them, everything else is small.
        floating = {n for n, f in forms.items() if f.dtype.lossy} | {
            n for n, t in constants.items() if t.is_floating_point()
        }
        streams = [shape for name, shape in resolved.items() if len(shape) == 3 and name in floating]
        self._check_memory(forms, streams)
        self._check_time(streams, seconds)
        if len(self._passed) >= _REMEMBERED:
            self._passed.clear()
        self._passed.add(asked)

    def _check_memory(self, forms: Mapping[str, Form], streams: Sequence[tuple[int, ...]]) -> None:
        tokens = sum(prod(shape[:-1]) for shape in streams)
        needed = 2 * sum(form.nbytes for form in forms.values()) + 2 * tokens * self._widest * self._dtype.itemsize
        if self._device.type not in _FUSED:
            needed += sum(shape[0] * shape[1] ** 2 for shape in streams) * self._dtype.itemsize
        memory = self._memory if self._memory is not None else spare_memory(self._device)
        if needed > memory:
            raise PlanDoesNotFit(
                f"A step over {tokens} tokens needs {needed / 1e9:.2f} GB beside the weights, this worker has "
                f"{memory / 1e9:.2f} GB for it.",
                hint="a smaller picture or a shorter video, fewer blocks for this worker, or a larger [worker] "
                "step_memory in its config.toml",
            )

    def _check_time(self, streams: Sequence[tuple[int, ...]], seconds: float) -> None:
        linear = sum(prod(shape[:-1]) for shape in streams) * self._weights * 2
        attention = sum(shape[0] * shape[1] ** 2 for shape in streams) * self._width * 4 * self._blocks
        if linear + attention < _QUICK:
            return
        least = (linear + attention) / peak_operations(self._device, self._dtype)
        if least > _HOPELESS * seconds:
            raise TransportTimeout(
                f"The step would take {least:.0f} s on this worker, its deadline is {seconds:.0f} s.",
                hint="a smaller picture or a shorter video, or a longer deadlines.step in config.toml of the host and "
                "of the worker",
            )
