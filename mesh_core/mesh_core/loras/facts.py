"""What a LoRA's metadata tells people, read without trusting it."""

from __future__ import annotations

from collections.abc import Mapping
from heapq import nlargest

import msgspec

_MOST_TAGS = 100_000
"""Of a trainer's list of tags that is read."""

_TAGS = msgspec.json.Decoder(dict[str, dict[str, int]])


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
        folders = _TAGS.decode(text) if text and text.count(":") <= _MOST_TAGS else {}
    except (msgspec.DecodeError, UnicodeError):
        return ""
    counts: dict[str, int] = {}
    for tags in folders.values():
        for tag, n in tags.items():
            counts[tag[:60]] = counts.get(tag[:60], 0) + n
    return ", ".join(nlargest(most, counts, key=lambda tag: counts[tag]))
