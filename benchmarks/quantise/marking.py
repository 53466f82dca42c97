"""How ComfyUI's files say in which formats their layers are: a small tensor beside each, or a note in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

Written = tuple[dict[str, Tensor], dict[str, str]]
"""The tensors of a file and its metadata."""

Marking = Literal["new", "metadata"]
"""As for 8-bit floats: a tensor ``comfy_quant`` beside each weight, or a note in the header."""


def marks(layers: Mapping[str, Mapping[str, Any]], marking: Marking) -> Written:
    """The marker tensors and the metadata that say this of ``layers``: ``{"format": ..., option: value, ...}`` each."""
    if marking == "metadata":
        return {}, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    said: dict[str, Tensor] = {}
    for layer, options in layers.items():
        said[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(options).encode()), dtype=torch.uint8)
    return said, {}
