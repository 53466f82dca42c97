"""What LoRAs are scaled by where no tensor says it: the PEFT configuration that diffusers stores in the metadata."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from time import monotonic
from typing import Any

import msgspec

from mesh_core.errors import LoraError

_LONGEST = 1 << 20
"""Characters of a configuration that is read."""

_PLAIN = re.compile(r"\^?[\w.]*")
_ESCAPED = re.compile(r"\\.|\[(?:\\.|[^\\\]])+\]")
_REPEATED = re.compile(r"[*+?{]")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_MOST_REPEATED = 3
_LONGEST_PATTERN = 200
_SECONDS = 2.0
"""That matching all modules against all patterns may take; real ones take milliseconds."""

_CONFIG = msgspec.json.Decoder(dict[str, Any])

Scaling = Callable[[str, int], float | None]
"""Alpha by a module's name and its rank; None if nothing is known of it."""


def peft_scaling(metadata: Mapping[str, str]) -> Scaling:
    """As the entry ``lora_adapter_metadata`` says. Damaged or missing, it says nothing.

    Raises:
        LoraError: a pattern of names that is no expression, or could take forever to match; so may the result.
    """
    try:
        stored = _CONFIG.decode(metadata.get("lora_adapter_metadata", "{}")[:_LONGEST])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        stored = {}
    config = {k.removeprefix("transformer."): v for k, v in stored.items() if not k.startswith("text_encoder")}
    base, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(base, (int, float)) or not isinstance(patterns, dict):
        return lambda stem, rank: None
    first_match = _Patterns(list(patterns))

    def alpha(stem: str, rank: int) -> float | None:
        found = first_match(stem)
        value = base if found is None else patterns[found]
        if not isinstance(value, (int, float)):
            return None
        return float(value) * sqrt(rank) if config.get("use_rslora") else float(value)

    return alpha


class _Patterns:
    """Which of several patterns is PEFT's for a module: the first that matches the end of its name, from a dot on.

    Files hold one plain name for each module, so those are looked up; expressions are tried one by one, and must be of
    a kind that takes no more than polynomial time.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        plain = {p: i for i, p in enumerate(patterns) if _PLAIN.fullmatch(p)}
        # A dot in a name is meant as one; of an expression it is any letter, which no two modules differ by.
        self._names = {p.removeprefix("^"): (i, p) for p, i in plain.items()}
        self._expressions = [(i, p, _compiled(p)) for i, p in enumerate(patterns) if p not in plain]
        self._left = _SECONDS

    def __call__(self, stem: str) -> str | None:
        ends = [stem, *(stem[i + 1 :] for i, letter in enumerate(stem) if letter == ".")]
        named = [self._names[end] for end in ends if end in self._names]
        found = min(((i, p) for i, p in named if p in (f"^{stem}", p.removeprefix("^"))), default=None)
        started = monotonic()
        for place, pattern, expression in self._expressions:
            if (found is None or place < found[0]) and expression.match(stem):
                found = place, pattern
                break
        self._left -= monotonic() - started
        if self._left < 0:
            raise LoraError(
                f"The patterns of alpha_pattern take more than {_SECONDS:.0f} s to match.", hint="a file without them"
            )
        return found[1] if found is not None else None


def _compiled(pattern: str) -> re.Pattern[str]:
    simple = _ESCAPED.sub("x", pattern)
    if (
        len(pattern) <= _LONGEST_PATTERN
        and len(_REPEATED.findall(simple)) <= _MOST_REPEATED
        and not _REPEATED_GROUP.search(simple)
    ):
        try:
            return re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, RecursionError, OverflowError) as error:
            why = f"is no expression: {error}"
    else:
        why = "repeats so much that it could take forever to match"
    raise LoraError(f"The pattern {pattern[:100]!r} of alpha_pattern {why}.", hint="another copy of the file")
