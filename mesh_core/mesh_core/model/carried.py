"""What a stage cannot carry yet, refused by name: a model of which a part would be lost computes something else.

A stage gets the parameters that `ModelSpec` lists, all in one type. A family's class may hold more than that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mesh_core.errors import CheckpointUnrecognised


def refuse_other_tensors(model: nn.Module) -> None:
    """Refuse tensors of a model that are no parameters: they are in no checkpoint's spec, so stages would lack them.

    Args:
        model: as its class makes it; a model that ran may keep tensors that follow from its inputs.

    Raises:
        CheckpointUnrecognised: names the first.
    """
    found = next(_other_tensors(model), None)
    if found is not None:
        raise CheckpointUnrecognised(
            f"{type(model).__name__} holds {found}, a tensor that is no parameter. Stages are given parameters only, "
            "so a part of this model would be missing on a worker.",
            hint="the model unsplit, or an adapter whose model computes that tensor in forward()",
        )


def refuse_kept_in_float32(model: nn.Module, dtype: torch.dtype) -> None:
    """Refuse to compute in less than float32 where the model's class keeps some of its parameters in float32.

    Raises:
        CheckpointUnrecognised: names the first of them.
    """
    kept = getattr(type(model), "_keep_in_fp32_modules", None) or ()
    kept = {kept} if isinstance(kept, str) else set(kept)
    if not kept or dtype.itemsize >= torch.float32.itemsize:
        return
    for name, _ in model.named_parameters():
        if not kept.isdisjoint(name.split(".")):
            raise CheckpointUnrecognised(
                f"{type(model).__name__} keeps {name} in float32 where the rest is {dtype}. A stage computes in one "
                "type, so its results would differ.",
                hint="dtype=torch.float32, or the model unsplit",
            )


def _other_tensors(model: nn.Module) -> Iterator[str]:
    for place, module in model.named_modules():
        for name, value in [*module._buffers.items(), *vars(module).items()]:
            if name not in ("_parameters", "_buffers", "_modules") and _holds_tensor(value):
                yield f"{place}.{name}".removeprefix(".")


def _holds_tensor(value: object) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(map(_holds_tensor, value)))
