"""What an access unit announces, read before a decoder sees it: NAL units, kind of picture, size of the picture.

Decoders allocate what a sequence parameter set announces, and show what they can of a damaged picture. So a unit is
let through only if it is one picture, of the kind, size and format that both ends derived for themselves. Written after
ITU-T H.265 (V8), sections 7.3.1 to 7.3.3. Must not know tensors or engines.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh_codec.errors import CodecCorrupt
from mesh_codec.hevc.geometry import Geometry

_TRAIL, _IDR, _VPS, _SPS, _PPS = frozenset({0, 1}), frozenset({19, 20}), 32, 33, 34
_ASIDE = frozenset({35, 39, 40})
"""Access unit delimiters and supplemental information."""

_MOST_NALS = 128
"""In one access unit. Encoders make under a dozen; the work that a hostile unit causes is bounded by it."""

_SPS_BYTES = 96
"""As many as are looked at: what is checked lies in the first 40 or so."""


def check_unit(unit: memoryview, geometry: Geometry, *, key: bool) -> None:
    """``unit`` is one whole picture of ``geometry``: an IDR picture with its parameter sets, or one predicted.

    Raises:
        CodecCorrupt: it is anything else.
    """
    data = bytes(unit)
    kinds: list[int] = []
    pictures = 0
    for start, end in _nals(data):
        kind = data[start] >> 1 & 0x3F
        if data[start] & 0x81 or data[start + 1] != 1:
            raise CodecCorrupt("A video packet has layers, where a plain stream belongs.")
        if kind in _TRAIL | _IDR:
            pictures += data[start + 2] >> 7
        elif kind == _SPS:
            _check_sequence(data[start + 2 : min(end, start + _SPS_BYTES)], geometry)
        kinds.append(kind)
    allowed = _ASIDE | (_IDR | {_VPS, _SPS, _PPS} if key else _TRAIL)
    if not allowed.issuperset(kinds) or pictures != 1 or (key and not {_VPS, _SPS, _PPS} <= set(kinds)):
        wanted = "key" if key else "predicted"
        raise CodecCorrupt(f"A video packet is not one {wanted} picture: its NAL units are of the types {kinds[:12]}.")


def is_key(unit: bytes) -> bool:
    """Whether ``unit`` has slices of an IDR picture."""
    return any(unit[start] >> 1 & 0x3F in _IDR for start, _ in _nals(unit))


def _nals(data: bytes) -> list[tuple[int, int]]:
    """Start and end of each NAL unit, header included, in a byte stream (annex B)."""
    starts: list[int] = []
    place = data.find(b"\x00\x00\x01")
    if place < 0 or any(data[:place]):
        raise CodecCorrupt("A video packet does not begin with a NAL unit.")
    while place >= 0:
        starts.append(place + 3)
        if len(starts) > _MOST_NALS:
            raise CodecCorrupt(f"A video packet has more than {_MOST_NALS} NAL units.")
        place = data.find(b"\x00\x00\x01", place + 3)
    ends = [start - 3 for start in starts[1:]] + [len(data)]
    if any(end - start < 3 for start, end in zip(starts, ends, strict=True)):
        raise CodecCorrupt("A video packet has a NAL unit without content.")
    return list(zip(starts, ends, strict=True))


def _check_sequence(payload: bytes, geometry: Geometry) -> None:
    try:
        found = _read_sequence(_Bits(payload.replace(b"\x00\x00\x03", b"\x00\x00")))
    except IndexError as error:
        raise CodecCorrupt("A video packet's sequence parameters are cut short.") from error
    expected = _Sequence(3, geometry.width, geometry.height, geometry.bits, geometry.bits, 0)
    if found != expected:
        raise CodecCorrupt(f"A video packet announces {found}, where {expected} belongs.")


@dataclass(frozen=True)
class _Sequence:
    chroma: int
    width: int
    height: int
    bits: int
    chroma_bits: int
    reordered: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, chroma format {self.chroma}, {self.bits}/{self.chroma_bits} bit"


def _read_sequence(bits: _Bits) -> _Sequence:
    bits.skip(4)
    if bits.take(3):
        raise CodecCorrupt("A video packet announces temporal layers, where a plain stream belongs.")
    bits.skip(1 + 88 + 8)  # temporal nesting; profile, tier; level
    bits.number()
    chroma = bits.number()
    if chroma == 3 and bits.take(1):
        raise CodecCorrupt("A video packet announces separate colour planes, which decoders do not take.")
    width, height = bits.number(), bits.number()
    if bits.take(1):  # conformance window, in luma samples where chroma is 4:4:4
        left, right, top, bottom = (bits.number() for _ in range(4))
        # What is cut off is allocated and decoded all the same: encoders fill up to their largest coding block.
        if max(left, right, top, bottom) >= 64:
            raise CodecCorrupt("A video packet announces a picture that is cut from a larger one.")
        width, height = width - left - right, height - top - bottom
    luma, chroma_bits = bits.number() + 8, bits.number() + 8
    bits.number()
    bits.take(1)
    bits.number()
    return _Sequence(chroma, width, height, luma, chroma_bits, bits.number())


class _Bits:
    """A cursor over bits, most significant first."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    def skip(self, count: int) -> None:
        self._place += count

    def take(self, count: int) -> int:
        value = 0
        for _ in range(count):
            value = value << 1 | self._data[self._place >> 3] >> (7 - (self._place & 7)) & 1
            self._place += 1
        return value

    def number(self) -> int:
        """An unsigned Exp-Golomb number, ue(v), of at most 32 bits."""
        zeros = 0
        while not self.take(1):
            zeros += 1
            if zeros > 31:
                raise CodecCorrupt("A video packet's sequence parameters hold a number of more than 32 bits.")
        return (1 << zeros) - 1 + self.take(zeros)
