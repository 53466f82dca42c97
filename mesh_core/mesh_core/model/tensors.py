"""The tensors of a model: those that a checkpoint holds, and those that the model's class computes when it is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from mesh_core.errors import CheckpointUnrecognised

_TORCHS_OWN = ("_parameters", "_buffers", "_modules")
"""Attributes in which a module keeps what is registered."""


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name: what a checkpoint holds, and `ModelSpec.parameters` lists."""
    lasting = {
        name
        for place, module in model.named_modules(remove_duplicate=False)
        for name in (_joined(place, leaf) for leaf in module._buffers.keys() - module._non_persistent_buffers_set)
    }
    return {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if n in lasting}}


def stored_place(model: nn.Module, name: str) -> tuple[dict[str, Tensor | None], str]:
    """Where ``model`` keeps a parameter or persistent buffer: a module's own mapping, and the key there."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    return (owner._buffers if leaf in owner._buffers else owner._parameters), leaf  # type: ignore[return-value]


def emptied(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A parameter or buffer like it without data, on the meta device."""
    empty = torch.empty_like(tensor, dtype=dtype, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def computed_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What no checkpoint holds, by name: buffers that are not persistent, and tensors in plain attributes, also in
    lists, tuples and dictionaries there."""
    found: dict[str, Tensor] = {}
    for place, module in model.named_modules():
        lasting = module._buffers.keys() - module._non_persistent_buffers_set
        values = {k: v for k, v in module._buffers.items() if k not in lasting}
        values |= {k: v for k, v in vars(module).items() if k not in _TORCHS_OWN}
        for name, value in values.items():
            found.update(_within(_joined(place, name), value))
    return found


def move_computed_buffers(model: nn.Module, device: torch.device) -> None:
    """Have the buffers that no checkpoint holds on ``device``; plain attributes stay, as with ``Model.to``."""
    for module in model.modules():
        for name in module._non_persistent_buffers_set & module._buffers.keys():
            value = module._buffers[name]
            module._buffers[name] = value if value is None else value.to(device)


def types_beside(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[tuple[str, torch.dtype], ...]:
    """Which of ``tensors`` hold fractions in another type than ``dtype``: `Numerics.others` of a model in memory."""
    return tuple(sorted((n, t.dtype) for n, t in tensors.items() if t.is_floating_point() and t.dtype != dtype))


def kept_in_float32(model: nn.Module, dtype: torch.dtype) -> tuple[tuple[str, torch.dtype], ...]:
    """What ``from_pretrained(torch_dtype=dtype)`` leaves in float32: `Numerics.others` of the model's class.

    diffusers' classes name parts of names in ``_keep_in_fp32_modules``.
    """
    named = getattr(type(model), "_keep_in_fp32_modules", None) or ()
    kept = {named} if isinstance(named, str) else set(named)
    if dtype.itemsize >= torch.float32.itemsize:
        return ()
    fractions = (name for name, tensor in stored_tensors(model).items() if tensor.is_floating_point())
    return tuple(sorted((name, torch.float32) for name in fractions if not kept.isdisjoint(name.split("."))))


def refuse_without_values(model: nn.Module) -> None:
    """Refuse a model of which a tensor that is in no checkpoint has no values.

    Raises:
        CheckpointUnrecognised: names the first.
    """
    for name, tensor in computed_tensors(model).items():
        if tensor.is_meta:
            raise CheckpointUnrecognised(
                f"{type(model).__name__} holds {name}, a tensor that is no parameter and that its __init__ does not "
                "compute from others. This part of the model would be missing on a worker.",
                hint="the model unsplit, or an adapter whose model computes that tensor in forward()",
            )


def _within(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _within(f"{name}[{key!r}]", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _within(f"{name}[{index}]", item)


def _joined(place: str, leaf: str) -> str:
    return f"{place}.{leaf}" if place else leaf
