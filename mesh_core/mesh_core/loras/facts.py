"""What a LoRA's metadata tells people, read without trusting it."""

from __future__ import annotations

import json
from collections.abc import Mapping


def facts_for_people(metadata: Mapping[str, str]) -> dict[str, str]:
    """Title, base model and words that trigger it, as trainers write them; empty where they say nothing. Bounded."""

    def text(*keys: str) -> str:
        return next((str(metadata[k])[:200] for k in keys if metadata.get(k)), "")

    words = text("modelspec.trigger_phrase", "ss_trigger_words", "trigger_words")
    if not words:
        words = _frequent_tags(metadata.get("ss_tag_frequency", ""))
    return {
        "title": text("modelspec.title", "ss_output_name"),
        "base": text("modelspec.architecture", "ss_base_model_version", "base_model"),
        "trigger": words,
    }


def _frequent_tags(text: str, most: int = 5) -> str:
    try:
        folders = json.loads(text) if text else {}
        counts: dict[str, int] = {}
        for tags in folders.values():
            for tag, n in tags.items():
                counts[str(tag)[:60]] = counts.get(str(tag)[:60], 0) + int(n)
    except (ValueError, AttributeError, TypeError, RecursionError):
        return ""
    return ", ".join(sorted(counts, key=lambda t: -counts[t])[:most])
