"""How fast codecs run on a machine: what is known of one, and reading what another machine says, within reason.

Knows no links and no sessions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mesh_core.crossing.bandwidth import positive

MOST_FIXED, RATES = 10.0, (1e4, 1e13)
"""Seconds per call and bytes per second that a machine may claim; anything beyond is taken for the nearest."""


@dataclass(frozen=True)
class Speed:
    """``fixed`` seconds per call, and ``rate`` bytes of tensor per second beyond."""

    fixed: float
    rate: float

    def seconds(self, nbytes: float) -> float:
        """That a tensor of ``nbytes`` takes."""
        return self.fixed + nbytes / self.rate


@dataclass(frozen=True)
class CodecSpeed:
    """One codec with one kind of settings on one machine.

    Attributes:
        bits: per element of the sample.
        exact: the sample came back bit for bit.
    """

    encode: Speed
    decode: Speed
    bits: float = 0.0
    exact: bool = False


COPYING = CodecSpeed(Speed(0.0, 5e9), Speed(0.0, 5e9), exact=True)
"""Of the raw codec, which does nothing else: not worth a measurement."""


def read_speed(said: object) -> Speed | None:
    """``[fixed, rate]`` as a peer says it, within reason; None when it says nothing that can be used."""
    if not isinstance(said, list | tuple) or len(said) != 2:
        return None
    fixed, rate = positive(said[0]), positive(said[1])
    if rate is None or (fixed is None and said[0] != 0):
        return None
    return Speed(min(fixed or 0.0, MOST_FIXED), min(max(rate, RATES[0]), RATES[1]))


def read_speeds(said: object) -> dict[tuple[str, str], CodecSpeed]:
    """The speeds by codec and engine that a peer tells; what cannot be used is left out."""
    found: dict[tuple[str, str], CodecSpeed] = {}
    for entry in said if isinstance(said, list | tuple) else ():
        if isinstance(entry, Mapping):
            codec, engine = entry.get("codec"), entry.get("engine")
            encode, decode = read_speed(entry.get("encode")), read_speed(entry.get("decode"))
            if isinstance(codec, str) and isinstance(engine, str) and encode and decode:
                found[codec, engine] = CodecSpeed(encode, decode)
    return found
