"""Making a model without its weights, and with all that its class computes itself: tables of positions, frequencies.

diffusers constructs a model with the type that it is loaded in as torch's default type, so a table may be computed in
bfloat16. That default is one for all threads of a process, and others compute meanwhile; here it is one thread's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mesh_core.errors import CheckpointMismatch
from mesh_core.model.fingerprint import of_tensor
from mesh_core.model.numerics import Numerics
from mesh_core.model.tensors import (
    computed_tensors,
    emptied,
    kept_in_float32,
    refuse_without_values,
    stored_place,
    stored_tensors,
)

_SAY_THEIR_TYPE = {torch.Tensor.float, torch.Tensor.type, torch.from_numpy, torch.frombuffer}
"""Calls whose result has a type of its own, although no argument is a type."""


def without_weights(
    make: Callable[[], nn.Module], dtype: torch.dtype, computed: Iterable[tuple[str, str]] | None = None
) -> nn.Module:
    """A model whose parameters and persistent buffers have no data; what else it holds is computed, on the CPU.

    Weights are neither allocated nor initialised.

    Args:
        make: calls the model's class.
        dtype: in which the model computes.
        computed: what the model must hold besides its weights, by hash as `hashes` gives them: whether its class
            computed it in ``dtype`` (as ``from_pretrained`` does), or in float32 (as ``Model(...)`` does), and whether
            that was cast (as ``.to(dtype)`` does). None for how ``from_pretrained`` does.

    Raises:
        CheckpointUnrecognised: it holds a tensor that is neither in checkpoints nor computed.
        CheckpointMismatch: its class computes others here.
    """
    with torch.device("meta"):
        model = make()
    wanted = None if computed is None else dict(computed)
    differs = ""
    if not computed_tensors(model):
        differs = min(wanted or (), default="")
    else:
        for within, cast in ((dtype, False), (torch.float32, True), (torch.float32, False), (dtype, True)):
            model = _made(make, within)
            if cast:
                _cast(model, dtype)
            if wanted is None or not (found := _first_difference(wanted, hashes(computed_tensors(model)))):
                return model
            differs = differs or found
    if differs:
        raise CheckpointMismatch(
            f"{type(model).__name__} holds {differs}, which is no parameter, and which is something else on the host.",
            hint="the same version of diffusers on all machines, and the tensor as the model's class computes it",
        )
    return model


def as_loaded(numerics: Numerics, make: Callable[[], nn.Module]) -> Numerics:
    """``numerics`` with what ``from_pretrained(torch_dtype=numerics.dtype)`` keeps in float32 and computes.

    Args:
        make: calls the model's class.
    """
    model = without_weights(make, numerics.dtype)
    computed = tuple(sorted(hashes(computed_tensors(model)).items()))
    return replace(numerics, others=kept_in_float32(model, numerics.dtype), computed=computed)


def hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """By name, the hash of each tensor's type, shape and values."""
    return {
        name: blake3(json.dumps([str(t.dtype), list(t.shape)]).encode() + of_tensor(t.resolve_conj())).hexdigest()
        for name, t in tensors.items()
    }


def _made(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    with torch.device("cpu"), _Constructing(dtype):
        model = make()
    replaced: dict[int, Tensor] = {}
    for name, tensor in stored_tensors(model).items():
        if not tensor.is_meta:
            replaced[id(tensor)] = emptied(tensor)
            place, leaf = stored_place(model, name)
            place[leaf] = replaced[id(tensor)]
    # Tied ones are listed once.
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            module._parameters[leaf] = replaced.get(id(parameter), parameter)  # type: ignore[assignment]
    refuse_without_values(model)
    return model


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    for module in model.modules():
        for name, value in module._buffers.items():
            if value is not None and value.is_floating_point():
                module._buffers[name] = value.to(dtype)


def _first_difference(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    return min((name for name in one.keys() | other.keys() if one.get(name) != other.get(name)), default="")


class _Constructing(TorchFunctionMode):
    """Memory that is to be filled later, as that of layers, is none; and what has no type of its own gets ``dtype``.

    Only in the thread that enters it, unlike `torch.set_default_dtype`.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype, self._usual = dtype, torch.get_default_dtype()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty:
            given["device"] = "meta"
        made = func(*args, **given)
        if self._dtype == self._usual or not self._has_no_type_of_its_own(func, made, [*args, *given.values()]):
            return made
        if not any(isinstance(value, Tensor) for value in _flat([*args, *given.values()])):
            return func(*args, **{**given, "dtype": self._dtype})
        try:
            # As torch does: whole numbers are cast to the default type, and computed with in it.
            return func(*map(self._cast, args), **{name: self._cast(value) for name, value in given.items()})
        except (TypeError, RuntimeError):
            return made.to(self._dtype)

    def _has_no_type_of_its_own(self, func: Any, made: Any, given: list[Any]) -> bool:
        if not isinstance(made, Tensor) or made.dtype != self._usual or func in _SAY_THEIR_TYPE:
            return False
        for value in _flat(given):
            if isinstance(value, torch.dtype) or (hasattr(value, "dtype") and not isinstance(value, Tensor)):
                return False
            if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                return False
        return True

    def _cast(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(self._cast, value))
        return value.to(self._dtype) if isinstance(value, Tensor) else value


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value
