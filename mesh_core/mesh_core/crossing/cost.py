"""What is known of a state's way over one cut, and what crossing it would cost: the facts of a codec choice.

Knows neither sessions nor sockets. `mesh_core.host.choices` gathers the facts, ``mesh_choose_codec`` decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mesh_core.crossing.bandwidth import Link

if TYPE_CHECKING:
    import torch

    from mesh_codec.base import Codec, CodecChoice
    from mesh_core.crossing.codec_speed import CodecSpeed
    from mesh_core.crossing.speed_book import SpeedBook

UNMEASURED = Link(110e6, 1e-3)
"""What a route that nobody has measured is expected to be: Gigabit Ethernet, which most people have."""


@dataclass(frozen=True)
class Cost:
    """What a tensor costs on its way, in seconds.

    Attributes:
        bits: per element.
        label: what codes it, for people.
        exact: whether it came back bit for bit when that was tried.
    """

    bits: float
    encode: float
    wire: float
    decode: float
    label: str = ""
    exact: bool = False

    @property
    def total(self) -> float:
        """Seconds from tensor to tensor."""
        return self.encode + self.wire + self.decode


@dataclass
class End:
    """One end of a route: how fast codecs run there.

    Attributes:
        claimed: by codec and engine; what a machine says of itself.
        book: of this machine; None where the end is another one.
        factors: what steps really took over what was expected, by codec and direction.
    """

    claimed: dict[tuple[str, str], CodecSpeed] = field(default_factory=dict)
    book: SpeedBook | None = None
    factors: dict[tuple[str, str], float] = field(default_factory=dict)

    def speed(self, codec: str, engine: str) -> CodecSpeed | None:
        """As claimed; that of another engine of the codec is better than nothing."""
        exactly = self.claimed.get((codec, engine))
        return exactly or next((speed for (name, _), speed in self.claimed.items() if name == codec), None)


@dataclass(frozen=True)
class Crossing:
    """A route over one cut, as ``mesh_choose_codec`` gets it.

    Attributes:
        link: measured bandwidth and latency; None where nobody could measure.
        elements: of all tensors of the role together; assumed until a first step has crossed.
        dtype: of the tensors.
        sender, receiver: the ends.
        here: this machine's own speeds; it stands for ends that tell nothing of theirs.
        bits: per element as they came out, by codec and settings (see `settings_key`).
        current: the choice that is in use; None when the streams open first.
    """

    elements: int
    dtype: torch.dtype
    sender: End
    receiver: End
    here: SpeedBook
    link: Link | None = None
    bits: Mapping[str, float] = field(default_factory=dict)
    current: CodecChoice | None = None

    def cost(self, codec: Codec, settings: Mapping[str, Any]) -> Cost | None:
        """What the tensors would cost with ``codec``; None while nothing is known of it, or if it cannot be used on
        this machine, which then cannot tell of others either."""
        mine = self.here.look(codec, settings, self.dtype)
        if mine is None:
            return None
        estimate = codec.estimate(settings, self.dtype)
        seen = self.bits.get(settings_key(codec.name, settings))
        bits = seen if seen is not None else estimate.bits if estimate.bits is not None else mine.bits
        nbytes = self.elements * self.dtype.itemsize

        def seconds(end: End, direction: str) -> float:
            speed = mine if end.book is not None else end.speed(codec.name, estimate.engine) or mine
            known = speed.encode if direction == "encode" else speed.decode
            return known.seconds(nbytes) * end.factors.get((codec.name, direction), 1.0)

        wire = (self.link or UNMEASURED).seconds(self.elements * bits / 8)
        label = estimate.label or codec.name
        return Cost(bits, seconds(self.sender, "encode"), wire, seconds(self.receiver, "decode"), label, mine.exact)


def settings_key(codec: str, settings: Mapping[str, Any]) -> str:
    """A codec with its settings as a key."""
    return f"{codec} {sorted(settings.items(), key=lambda item: item[0])!r}"
