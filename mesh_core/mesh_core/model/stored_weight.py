"""A stored weight in memory: a tensor that has the shape and type of its numbers and holds codes and scales.

Every operation on it sees the numbers, made for the moment by its format; `linear` is the format's own. So a module of
any model class computes with it, and nothing of the model is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from mesh_core.errors import UnsupportedInput
from mesh_core.model.stored import WeightFormat


class Change(Protocol):
    """What is computed with a stored weight beside what is stored: a LoRA."""

    def linear(self, x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
        """What a linear layer with the changed weight gives for ``x``. ``weight`` is the unchanged one."""
        ...

    def numbers(self, weight: StoredWeight) -> Tensor:
        """The changed numbers, a new tensor in the type of ``weight``, which is the unchanged one."""
        ...


class StoredWeight(Tensor):
    """Shape [rows, columns], dtype that of the numbers.

    Attributes:
        format, kind, arithmetic: see `WeightFormat`.
        parts: by role; all on one device.
        change: what it is computed with, None for the weight as it is stored.
    """

    format: WeightFormat
    kind: str
    parts: Mapping[str, Tensor]
    arithmetic: str
    change: Change | None

    @staticmethod
    def __new__(
        cls,
        format: WeightFormat,
        kind: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        parts: Mapping[str, Tensor],
        arithmetic: str,
        change: Change | None = None,
    ) -> StoredWeight:
        made = cast(Any, Tensor)._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=parts["codes"].device, requires_grad=False
        )
        made.format, made.kind, made.parts, made.arithmetic = format, kind, dict(parts), arithmetic
        made.change = change
        return cast(StoredWeight, made)

    def __init__(self, *_: object, **__: object) -> None:
        """All is done in ``__new__``, as for every tensor."""

    @property
    def label(self) -> str:
        """See `StoredTensor.label`."""
        return f"{self.format.name}/{self.kind}"

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Of what is stored."""
        return sum(part.nbytes for part in self.parts.values())

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers in ``dtype``, by default the weight's own; rounded twice where that is another one."""
        if self.change is not None:
            return self.change.numbers(self.changed_by(None)).to(dtype or self.dtype)
        numbers = self.format.dequantise(self.parts, self.kind, tuple(self.shape), self.dtype, self.arithmetic)
        return numbers.to(dtype or self.dtype)

    def with_parts(self, parts: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> StoredWeight:
        """The same weight held in other tensors, or with numbers of another type."""
        shape, dtype = tuple(self.shape), dtype or self.dtype
        return StoredWeight(self.format, self.kind, shape, dtype, parts, self.arithmetic, self.change)

    def changed_by(self, change: Change | None) -> StoredWeight:
        """The weight as it is stored, held in the same tensors, with this change instead of the one that it has."""
        shape = tuple(self.shape)
        return StoredWeight(self.format, self.kind, shape, self.dtype, self.parts, self.arithmetic, change)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x`` [..., columns] times the weight, [..., rows] in the type of ``x``."""
        if self.change is not None:
            return self.change.linear(x, self.changed_by(None), bias)
        return self.format.linear(x, self.parts, self.kind, tuple(self.shape), bias, self.arithmetic)

    def on(self, device: torch.device | str) -> StoredWeight:
        """The weight on another device."""
        return self.with_parts({role: part.to(device) for role, part in self.parts.items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredWeight:
        made = memo[id(self)] = self.with_parts({role: part.clone() for role, part in self.parts.items()})
        made._is_param = getattr(self, "_is_param", False)
        return made

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        roles = sorted(self.parts)
        for role in roles:
            setattr(self, f"_part_{role}", self.parts[role])
        return [f"_part_{role}" for role in roles], (self.format, self.kind, self.dtype, self.arithmetic, self.change)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, outer_size: Any, outer_stride: Any) -> StoredWeight:
        format, kind, dtype, arithmetic, change = meta
        parts = {name.removeprefix("_part_"): part for name, part in inner.items()}
        return StoredWeight(format, kind, tuple(outer_size), dtype, parts, arithmetic, change)

    def __repr__(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        return f"StoredWeight({self.label}, {tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear:
            x, weight, bias = _linear_arguments(*args, **(kwargs or {}))
            if isinstance(weight, StoredWeight) and not isinstance(x, StoredWeight):
                return weight.linear(x, numbers(bias))
        # Not the inherited one, which would call every result a stored weight.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0].with_parts(args[0].parts)
        if func is torch.ops.aten._to_copy.default and set(kwargs) <= {"device", "dtype", "non_blocking"}:
            return _moved(args[0], **kwargs)
        if any(_writes(a) and isinstance(v, StoredWeight) for a, v in zip(func._schema.arguments, args, strict=False)):
            raise UnsupportedInput(
                f"{func} would change a weight that is stored as {args[0].label}: its numbers are made for the moment.",
                hint="the model in bfloat16, not quantised",
            )
        return func(*tree_map(numbers, args), **tree_map(numbers, kwargs))


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def numbers(value: Any) -> Any:
    """A stored weight as its numbers; anything else as it is."""
    return value.dense() if isinstance(value, StoredWeight) else value


def _moved(
    weight: StoredWeight, device: Any = None, dtype: torch.dtype | None = None, non_blocking: bool = False
) -> StoredWeight:
    """It stays stored, also in another type, in which its numbers are made then, as `nn.Module.to` needs."""
    target = device if device is not None else weight.device
    parts = {role: part.to(target, non_blocking=non_blocking, copy=True) for role, part in weight.parts.items()}
    return weight.with_parts(parts, dtype)
