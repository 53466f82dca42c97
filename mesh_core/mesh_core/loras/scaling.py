"""What LoRAs are scaled by where no tensor says it: the PEFT configuration that diffusers stores in the metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any

Scaling = Callable[[str, int], float | None]
"""Alpha by a module's name and its rank; None if nothing is known of it."""


def peft_scaling(metadata: Mapping[str, str]) -> Scaling:
    """As the entry ``lora_adapter_metadata`` says. Damaged or missing, it says nothing."""
    try:
        stored = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        stored = {}
    config: dict[str, Any] = {}
    if isinstance(stored, dict):
        config = {k.removeprefix("transformer."): v for k, v in stored.items() if not k.startswith("text_encoder")}
    base, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(base, (int, float)) or not isinstance(patterns, dict):
        return lambda stem, rank: None

    def alpha(stem: str, rank: int) -> float | None:
        value: Any = base
        for pattern, other in patterns.items():
            # Patterns are module names or their ends; PEFT allows expressions, which trainers do not write.
            if stem == pattern or stem.endswith(f".{pattern}"):
                value = other
        if not isinstance(value, (int, float)):
            return None
        return float(value) * sqrt(rank) if config.get("use_rslora") else float(value)

    return alpha
