"""The weights of a model that ComfyUI loaded, as a file would hold them: quantised ones as codes, scales and markers.

Later versions say so themselves (``state_dict`` of their quantised tensors and layers); earlier ones have tensors of a
class of their own, which are taken apart here. Imports nothing of ComfyUI.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mesh_core.errors import CheckpointUnrecognised
from mesh_core.model.checkpoint import CheckpointHeader
from mesh_core.model.spec import ParameterSpec
from mesh_core.model.stored_weight import StoredWeight
from mesh_core.model.weights import WeightReader, exponents_as_bytes
from mesh_core.plugins.registry import Plugins
from mesh_core.programs.in_memory import header_in_memory

MEMORY = Path("(weights in ComfyUI)")
"""Stands for the file of a model that ComfyUI loaded."""

_NAMES = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
"""How markers name the formats that earlier versions have."""


def header_of_tensors(tensors: Mapping[str, Tensor], plugins: Plugins) -> CheckpointHeader:
    """What `tensors_of` gives as the header of a file would list it.

    Raises:
        CheckpointUnrecognised: a tensor of another class than torch's own, which no format knows.
    """
    listed = {name: exponents_as_bytes(tensor) for name, tensor in tensors.items()}
    return header_in_memory(listed, MEMORY, plugins)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of ComfyUI's ``diffusion_model`` by the names that a file has for them.

    Raises:
        CheckpointUnrecognised: one is quantised in a way that is not known.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        found |= apart(name, tensor)
    return found


def apart(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What a file holds for one tensor: itself, if it is a plain one.

    Raises:
        CheckpointUnrecognised: it is quantised in a way that is not known.
    """
    own: Any = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    codes = getattr(own, "_qdata", None)
    if codes is None:
        return {name: tensor}
    if hasattr(own, "state_dict"):
        parts: dict[str, Tensor] = own.state_dict(name)
        return parts
    layer, params = name.removesuffix(".weight"), own._layout_params
    format = _NAMES.get(codes.dtype)
    if format is None or not isinstance(params.get("scale"), Tensor) or layer == name:
        raise CheckpointUnrecognised(
            f"{name} is quantised in a way that is not known ({own._layout_type}).",
            hint="a newer ComfyUI, or the same model in bfloat16",
        )
    marker = torch.tensor(list(json.dumps({"format": format}).encode()), dtype=torch.uint8)
    return {name: codes, f"{layer}.weight_scale": params["scale"], f"{layer}.comfy_quant": marker}


def stored_weight(
    parameter: ParameterSpec, header: CheckpointHeader, tensor: Callable[[str], Tensor], dtype: torch.dtype
) -> StoredWeight:
    """A parameter that is stored in a format, made from tensors in memory, on the CPU.

    Args:
        tensor: gives those by the names in ``header``.
        dtype: of its numbers.

    Raises:
        CheckpointCorrupt: they hold what cannot be.
        CheckpointUnrecognised: they cannot be one weight.
    """
    return WeightReader(replace(header, values=_OnTheCpu(header, tensor))).read_stored(parameter, dtype)


class _OnTheCpu(Mapping[str, Tensor]):
    """Tensors that are fetched when they are asked for."""

    def __init__(self, header: CheckpointHeader, tensor: Callable[[str], Tensor]) -> None:
        self._header, self._tensor = header, tensor

    def __getitem__(self, name: str) -> Tensor:
        return self._tensor(name).detach().cpu()

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self._header.tensors)

    def __len__(self) -> int:
        return len(self._header.tensors)
