"""What a worker's link can carry, and what each quality would cost over it. Needs no model and opens no session.

Codecs are chosen as a session would choose them before its first step: by ``mesh_choose_codec``, from what was measured
of the link and what both ends know of their codecs' speeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

from mesh_codec.base import CodecChoice
from mesh_codec.qualities import Quality, names
from mesh_core import wire
from mesh_core.crossing.bandwidth import Link
from mesh_core.crossing.codec_speed import read_speeds
from mesh_core.crossing.cost import Cost, Crossing, End
from mesh_core.crossing.speed_book import SpeedBook
from mesh_core.host.remote import Remote
from mesh_core.host.remote import measure as measure_link
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Settings
from mesh_core.system.tables import aligned
from mesh_core.transport.base import Address
from mesh_core.visible import visible

STATE = (4608, 4096)
"""Tokens and channels: a picture of 1024x1024 with 512 text tokens, in a model 4096 wide."""

PREDICTION = (4096, 128)
"""What comes back: packed latents of the picture."""

DTYPE = torch.bfloat16
_BACK = PREDICTION[0] * PREDICTION[1] * DTYPE.itemsize
_ROUND_TRIPS = 3


@dataclass(frozen=True)
class QualityCost:
    """What one quality costs for a state of `STATE`. Milliseconds.

    Attributes:
        codec: that would be chosen, as people call it.
        bits: per element, as expected before anything was coded.
        state_bytes: that the coded state has.
        encode_ms, decode_ms: here and there; as far as a worker tells its speeds, else as here.
        wire_ms: as the measured bandwidth says.
        total_ms: of the three.
        round_trip_ms: of as many bytes there and an uncoded prediction back, just exchanged; median of some.
    """

    quality: Quality
    codec: str
    bits: float
    state_bytes: int
    encode_ms: float
    wire_ms: float
    decode_ms: float
    total_ms: float
    round_trip_ms: float


@dataclass(frozen=True)
class LinkReport:
    """A worker's link: bytes per second each way, seconds there and back, and what each quality costs."""

    worker: str
    encrypted: bool
    there: Link
    back: Link
    qualities: tuple[QualityCost, ...]


def measure(address: str, plugins: Plugins, settings: Settings, device: torch.device) -> LinkReport:
    """Connect to the worker at ``address`` and measure; ``device`` codes at this end. Takes seconds, or as long as
    some uncoded states need to cross.

    Raises:
        Unreachable, NotAuthorised, TransportTimeout, PeerLost: as for any connection.
    """
    remote, book = Remote(Address(address), plugins, settings), SpeedBook(device)
    try:
        remote.connect()
        there, back = measure_link(remote)
        book.survey(codec for name, codec in plugins.codecs().items() if name in remote.welcome.codecs)
        costs = tuple(_costs(remote, there, book))
        return LinkReport(remote.name, bool(remote.address.server_key), there, back, costs)
    finally:
        book.close()
        remote.close()


def _costs(remote: Remote, link: Link, book: SpeedBook) -> Iterator[QualityCost]:
    there = End()
    for device in remote.welcome.devices:
        there.claimed |= read_speeds(device.get("speeds"))
    elements = STATE[0] * STATE[1]
    crossing = Crossing(elements, DTYPE, End(book=book), there, book, link)
    trips: dict[int, float] = {}
    for quality in names():
        if (found := _chosen(remote, quality, crossing)) is None:
            continue
        nbytes = round(elements * found.bits / 8)
        if nbytes not in trips:
            trips[nbytes] = median(_round_trip(remote, nbytes) for _ in range(_ROUND_TRIPS))
        parts = (found.encode * 1e3, found.wire * 1e3, found.decode * 1e3)
        yield QualityCost(quality, found.label, found.bits, nbytes, *parts, found.total * 1e3, trips[nbytes] * 1e3)


def _chosen(remote: Remote, quality: Quality, crossing: Crossing) -> Cost | None:
    """What the state costs with the codec that a session would begin with; None if no common one gives the quality."""
    theirs, ours = remote.welcome.codecs, remote.plugins.codecs()
    able = [codec for name, codec in ours.items() if name in theirs]
    choice: CodecChoice | None = remote.plugins.hook.mesh_choose_codec(
        role="hidden",
        link=crossing.link,
        quality=quality,
        codecs=able,
        peer={codec.name: theirs[codec.name] for codec in able},
        crossing=crossing,
    )
    if choice is None:
        return None
    # The survey has coded with settings like these; with these very ones it takes a moment more.
    crossing.here.find(ours[choice.codec], choice.settings, DTYPE)
    return crossing.cost(ours[choice.codec], choice.settings)


def _round_trip(remote: Remote, nbytes: int) -> float:
    """Seconds for so many bytes there, and a prediction back."""
    payload = bytes(min(nbytes, wire.PROBE_BYTES))
    probe = wire.Probe(wire.next_id(), _BACK)
    began = perf_counter()
    remote.ask(probe, wire.Probed, timeout=remote.settings.deadlines.step, buffers=[payload])
    return perf_counter() - began


_HEADS = ("quality", "codec", "bits", "state MB", "encode ms", "wire ms", "decode ms", "sum ms", "round trip ms")

LEGEND = f"""\
For a state of {STATE[0]} x {STATE[1]} in bfloat16, a picture of 1024x1024. encode, wire, decode: expected from the
speeds of both ends' codecs and the bandwidth there. round trip: measured, so many bytes there and a prediction of
{_BACK / 1e6:.1f} MB back; a step takes as long, and what coding and computing take."""


def table(found: LinkReport) -> str:
    """Plain text: the link, then a row per quality."""
    cells = [list(_HEADS)]
    for q in found.qualities:
        times = (q.encode_ms, q.wire_ms, q.decode_ms, q.total_ms, q.round_trip_ms)
        row = (q.quality, q.codec, f"{q.bits:.2f}", f"{q.state_bytes / 1e6:.2f}", *(f"{ms:.1f}" for ms in times))
        cells.append(list(row))
    lines = [
        f"{visible(found.worker)}, {'encrypted' if found.encrypted else 'NOT encrypted'}",
        f"there: {found.there}",
        f"back:  {found.back}",
        f"{found.there.latency * 1e3:.1f} ms there and back",
    ]
    return "\n".join([*lines, "", *aligned(cells), "", LEGEND])
