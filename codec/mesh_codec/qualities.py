"""The table of qualities: how exact the picture has to be. Whatever offers, explains or obeys a quality reads it here.

A new quality is a new row. Imports nothing but the standard library and the errors, so that a command line can list
qualities without loading torch. Must not know any codec.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh_codec.errors import CodecUnsupported

Quality = str
"""The name of a row of `QUALITIES`; `find` says which names there are."""


@dataclass(frozen=True)
class QualityLevel:
    """A quality: what it promises, and the numbers that codecs derive their settings from.

    Attributes:
        name: by which people choose it.
        promise: what they get, as the end of a sentence that begins with the name and a colon.
        psnr: in dB, the least that the final picture keeps against that of the uncut model; None: the very same bits.
        step: quantiser step that keeps this promise, in standard deviations of the channels; 0 where nothing is
            quantised.
    """

    name: Quality
    promise: str
    psnr: float | None = None
    step: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether every bit has to arrive: only codecs without loss may serve it."""
        return self.psnr is None


QUALITIES: tuple[QualityLevel, ...] = (
    QualityLevel("lossless", "the same bits"),
    QualityLevel("transparent", "no visible difference, a third of the bytes", psnr=40.0, step=0.1),
    QualityLevel("balanced", "hardly a visible difference, fewer bytes", psnr=35.0, step=0.2),
    QualityLevel("fast", "small visible differences, the fewest bytes", psnr=30.0, step=0.36),
)
"""From exact to coarse. The steps are from the table of ``mesh bench codec``: with each the least PSNR stays over the
promise with 4, 8 and 28 steps of a generation."""

EXACT: Quality = "lossless"
"""The default everywhere; exact whatever else the table has."""

FINE: Quality = "transparent"
"""The coarsest that state of role ``fine`` is coded with: it has few bytes, of which more loss would save next to
nothing."""

TYPICAL: Quality = "balanced"
"""Of the lossy ones, whose settings stand for all where a codec is timed before anyone has chosen."""


def names() -> tuple[Quality, ...]:
    """All qualities, from exact to coarse."""
    return tuple(level.name for level in QUALITIES)


def lossy() -> tuple[Quality, ...]:
    """Those that allow loss, from fine to coarse."""
    return tuple(level.name for level in QUALITIES if not level.exact)


def find(name: Quality) -> QualityLevel:
    """The row of ``name``.

    Raises:
        CodecUnsupported: no quality has this name.
    """
    for level in QUALITIES:
        if level.name == name:
            return level
    raise CodecUnsupported(f"There is no quality {str(name)[:40]!r}.", hint=f"one of {', '.join(names())}")


def finer_of(one: Quality, other: Quality) -> Quality:
    """Whichever of the two is more exact.

    Raises:
        CodecUnsupported: no quality has one of the names.
    """
    return min(find(one), find(other), key=QUALITIES.index).name


def promises() -> str:
    """What each quality promises, as sentences: "lossless: the same bits. transparent: ..."."""
    return " ".join(f"{level.name}: {level.promise}." for level in QUALITIES)
