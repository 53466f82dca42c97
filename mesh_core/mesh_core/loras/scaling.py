"""What LoRAs are scaled by where no tensor says it: the PEFT configuration that diffusers stores in the metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any

import msgspec

_LONGEST = 1 << 20
"""Characters of a configuration that is read."""

_CONFIG = msgspec.json.Decoder(dict[str, Any])

Scaling = Callable[[str, int], float | None]
"""Alpha by a module's name and its rank; None if nothing is known of it."""


def peft_scaling(metadata: Mapping[str, str]) -> Scaling:
    """As the entry ``lora_adapter_metadata`` says. Damaged or missing, it says nothing."""
    try:
        stored = _CONFIG.decode(metadata.get("lora_adapter_metadata", "{}")[:_LONGEST])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        stored = {}
    config = {k.removeprefix("transformer."): v for k, v in stored.items() if not k.startswith("text_encoder")}
    base, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(base, (int, float)) or not isinstance(patterns, dict):
        return lambda stem, rank: None
    # Patterns are module names or their ends, and the last one counts; PEFT allows expressions, which trainers do not
    # write.
    places = {pattern: place for place, pattern in enumerate(patterns)}

    def alpha(stem: str, rank: int) -> float | None:
        ends = [stem, *(stem[i + 1 :] for i, letter in enumerate(stem) if letter == ".")]
        found = max((end for end in ends if end in places), key=lambda end: places[end], default=None)
        value = base if found is None else patterns[found]
        if not isinstance(value, (int, float)):
            return None
        return float(value) * sqrt(rank) if config.get("use_rslora") else float(value)

    return alpha
