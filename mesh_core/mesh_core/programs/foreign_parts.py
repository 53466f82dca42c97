"""The modules of a split transformer that workers compute, alone or too: what is done to them here would not act there.

Their classes become subclasses of their own, which refuse hooks, replacements and other attention processors when they
are set; and modules that only workers compute refuse to be called here, by whatever got around the split.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from mesh_core.errors import UnsupportedInput
from mesh_core.model.spans import BlockSpan
from mesh_core.model.spec import ModelSpec

UNSPLIT_HINT = "before split(), or unsplit() first: then it acts on the whole model"

_REPLACED = ("forward", "processor")
"""Attributes of a module that decide what it computes."""


class PartElsewhere(nn.Module):
    """A module that workers compute too."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _REPLACED or isinstance(value, (nn.Module, nn.Parameter)):
            raise _refusal(self, f"another {name!r}")
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for tensor in (*self._parameters.values(), *self._buffers.values()):
            if tensor is not None and fn(torch.empty(0, dtype=tensor.dtype)).dtype != tensor.dtype:
                raise _refusal(self, "another type")
        return cast(Any, super())._apply(fn, recurse)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: UnsupportedInput."""
        raise _refusal(self, "a hook")

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: UnsupportedInput."""
        raise _refusal(self, "a hook")

    def set_processor(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: UnsupportedInput."""
        raise _refusal(self, "another attention processor")


class PartOnWorkers(PartElsewhere):
    """A module that only workers compute."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedInput(
            f"A {type(self).__name__} of the transformer was called here, and workers run it: what replaced the "
            "transformer's forward() calls its blocks itself, or the forward() that it had before the split.",
            hint="replace forward() after split(), and call the one that it has then",
        )


def mark(model: nn.Module, spec: ModelSpec, local: BlockSpan) -> None:
    """Make `PartElsewhere` or `PartOnWorkers` of all modules that do not belong to the span ``local`` alone."""
    unmark(model)
    for module, kind in parts_elsewhere(model, spec, local).values():
        object.__setattr__(module, "__class__", _subclass(cast(Any, kind), cast(Any, type(module))))


def unmark(model: nn.Module) -> None:
    """Undo `mark`."""
    for _, module in model.named_modules():
        if isinstance(module, PartElsewhere):
            object.__setattr__(module, "__class__", unmarked(type(module)))


def unmarked(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a module had before `mark`."""
    return cast("type[nn.Module]", kind.__bases__[1]) if issubclass(kind, PartElsewhere) else kind


def parts_elsewhere(
    model: nn.Module, spec: ModelSpec, local: BlockSpan
) -> dict[str, tuple[nn.Module, type[PartElsewhere]]]:
    """The modules below ``model``, by name, that not the blocks ``local`` alone use; none where all run here."""
    if len(local) == spec.blocks:
        return {}
    scopes: defaultdict[str, set[BlockSpan]] = defaultdict(set)
    for name, parameter in spec.parameters.items():
        while name := name.rpartition(".")[0]:
            scopes[name].add(parameter.scope)
    found = {}
    for name, module in model.named_modules():
        owner = name
        while owner and owner not in scopes:
            # No weights of its own, such as an activation: what it belongs to says.
            owner = owner.rpartition(".")[0]
        kind = _kind_of(scopes[owner], local) if owner else PartElsewhere
        if name and kind is not None:
            found[name] = (module, kind)
    return found


def _kind_of(scopes: set[BlockSpan], local: BlockSpan) -> type[PartElsewhere] | None:
    if all(local.start <= scope.start and scope.stop <= local.stop for scope in scopes):
        return None
    return PartElsewhere if any(scope.overlaps(local) for scope in scopes) else PartOnWorkers


def _refusal(module: nn.Module, what: str) -> UnsupportedInput:
    return UnsupportedInput(
        f"Workers compute this {type(module).__name__} of the split transformer: {what} would not act there.",
        hint=UNSPLIT_HINT,
    )


@cache
def _subclass(kind: Any, own: Any) -> type[nn.Module]:
    return type(own.__name__, (kind, own), {"__module__": own.__module__, "__qualname__": own.__qualname__})
