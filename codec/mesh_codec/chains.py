"""Where a payload stands in a stream of tensors that are predicted from each other. Must not know how.

A chain begins with a key tensor, which draws its name; each tensor has its index in it. A decoder that holds the
reference of another name or index says so, instead of predicting from what was not meant.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mesh_codec.payload import whole_number

_LARGEST = (1 << 62) - 1


@dataclass(frozen=True)
class ChainPosition:
    """Attributes:
    name: of the chain, drawn at random: ends that were started anew do not take up each other's chains.
    index: 0 for the key tensor.
    """

    name: int
    index: int = 0

    @classmethod
    def first(cls) -> ChainPosition:
        """The key tensor of a new chain."""
        return cls(secrets.randbits(62))

    @classmethod
    def read(cls, header: Mapping[str, Any]) -> ChainPosition:
        """Raises:
        CodecCorrupt: an entry is missing or no whole number in range.
        """
        return cls(whole_number(header, "chain", _LARGEST), whole_number(header, "index", _LARGEST))

    @property
    def next(self) -> ChainPosition:
        """That of the tensor after this one, in the same chain."""
        return ChainPosition(self.name, self.index + 1)

    @property
    def key(self) -> bool:
        """Whether it is predicted from nothing."""
        return not self.index

    def header(self) -> dict[str, Any]:
        """The entries that `read` finds again."""
        return {"chain": self.name, "index": self.index}
