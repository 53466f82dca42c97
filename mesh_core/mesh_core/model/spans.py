"""Spans of transformer blocks, written like Python slices. Knows no model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mesh_core.errors import PlanError

_SPAN = re.compile(r"\s*([0-9]{0,9})\s*:\s*([0-9]{0,9})\s*")


@dataclass(frozen=True, order=True)
class BlockSpan:
    """Blocks ``start`` to ``stop`` (excluded), numbered in execution order over all stacks of a model.

    A span that is not empty and starts at 0 includes the input layers; one that is not empty and stops at
    the last block includes the output layers. An empty span runs nothing and needs no weights.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise PlanError(
                f"A span runs forward from block 0: {self.start}:{self.stop} does not.",
                hint="start:stop with 0 <= start <= stop, for example :12 or 12:",
            )

    @classmethod
    def parse(cls, text: str, blocks: int) -> BlockSpan:
        """``"4:12"``, ``":12"``, ``"12:"`` or ``":"`` over a model of ``blocks`` blocks.

        Raises:
            PlanError: the text is no span, or a bound lies outside the model.
        """
        match = _SPAN.fullmatch(text)
        if match is None:
            raise PlanError(f"{text[:40]!r} is not a span of blocks.", hint="start:stop, for example :12, 12: or 4:20")
        start = int(match[1]) if match[1] else 0
        stop = int(match[2]) if match[2] else blocks
        if start > blocks or stop > blocks:
            raise PlanError(
                f"Span {text!r} reaches past the model, which has {blocks} blocks (0 to {blocks - 1}).",
                hint=f"a span within :{blocks}",
            )
        return cls(start, stop)

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    def __contains__(self, block: int) -> bool:
        return self.start <= block < self.stop

    def overlaps(self, other: BlockSpan) -> bool:
        """Whether the two share a block."""
        return max(self.start, other.start) < min(self.stop, other.stop)
