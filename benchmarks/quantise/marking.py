"""How ComfyUI's files say in which formats their layers are: a note in the metadata, or a small tensor beside each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

Where = Literal["note", "tensors"]


def marking(layers: Mapping[str, Mapping[str, Any]], where: Where) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The marker tensors and the metadata that say this of ``layers``: ``{"format": ..., option: value, ...}`` each."""
    if where == "note":
        return {}, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    said = {f"{layer}.comfy_quant": json.dumps(options).encode() for layer, options in layers.items()}
    return {name: torch.tensor(list(text), dtype=torch.uint8) for name, text in said.items()}, {}
