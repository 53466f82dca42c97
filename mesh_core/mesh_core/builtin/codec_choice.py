"""The built-in ``mesh_choose_codec``: the codec with which a step takes the least time at the quality asked for.

Decides on what `mesh_core.crossing.cost` says and keeps nothing of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mesh_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from mesh_codec.base import Codec, CodecChoice, Quality
    from mesh_core.crossing.bandwidth import Link
    from mesh_core.crossing.cost import Cost, Crossing
    from mesh_core.model.spec import Role

_WORTH_CODING = 0.9
"""Share of the time uncoded that a codec must stay under: what is as fast exact stays exact."""

_WORTH_CHANGING = 0.8
_WORTH_CHANGING_BY = 2e-3
"""Share of the present time, and seconds less, that a change of codec in a running generation must be good for."""

_PLAIN = "raw"


class DefaultCodecChoice:
    """Hidden state at the quality asked for, a fine one no coarser than `mesh_codec.qualities.FINE`, the model's input
    and output exact, small tensors as they are."""

    @hookimpl(trylast=True)
    def mesh_choose_codec(
        self,
        role: Role,
        link: Link | None,
        quality: Quality,
        codecs: Sequence[Codec],
        peer: dict[str, Any],
        crossing: Crossing,
    ) -> CodecChoice | None:
        from mesh_codec.base import CodecChoice

        if role == "exact":
            return CodecChoice(_PLAIN, {}, "exact") if any(c.name == _PLAIN for c in codecs) else None
        wanted = _wanted(role, quality)
        able = list(_able(wanted, codecs, peer))
        costs = list(_costs(wanted, able, crossing))
        if not costs:
            # Nothing is known of the one codec that the user allows, or of all that there are.
            return CodecChoice(able[0][0].name, able[0][1], f"{able[0][0].name}, not measured yet") if able else None
        codec, settings, cost = min(costs, key=lambda c: _rank(c[0], c[2]))
        present = _present(costs, crossing)
        if present is not None and not _worth_changing(cost, present[2]):
            codec, settings, cost = present
        measured = str(link) if link is not None else "link not measured"
        return CodecChoice(codec, settings, f"{measured}: {cost.label}, {cost.bits:.{1 if cost.bits < 10 else 0}f} bit")


def _wanted(role: Role, quality: Quality) -> Quality:
    from mesh_codec.qualities import EXACT, FINE, finer_of

    if role == "hidden":
        return quality
    return finer_of(quality, FINE) if role == "fine" else EXACT


_Candidate = tuple[str, dict[str, Any], "Cost"]


def _able(quality: Quality, codecs: Sequence[Codec], peer: dict[str, Any]) -> Iterator[tuple[Codec, dict[str, Any]]]:
    """The codecs that both ends have and that meet the quality, with their settings."""
    from mesh_codec.errors import CodecError

    for codec in codecs:
        if codec.name in peer:
            with suppress(CodecError):
                yield codec, codec.settings(quality, peer[codec.name])


def _costs(quality: Quality, able: Sequence[tuple[Codec, dict[str, Any]]], crossing: Crossing) -> Iterator[_Candidate]:
    """What they cost, as far as it is known."""
    from mesh_codec.qualities import find

    exact = find(quality).exact
    for codec, settings in able:
        cost = crossing.cost(codec, settings)
        if cost is not None and (cost.exact or not exact):
            yield codec.name, settings, cost


def _rank(codec: str, cost: Cost) -> float:
    return cost.total * (_WORTH_CODING if codec == _PLAIN else 1.0)


def _present(costs: list[_Candidate], crossing: Crossing) -> _Candidate | None:
    """The candidate that is in use."""
    current = crossing.current
    if current is None:
        return None
    return next((c for c in costs if c[0] == current.codec and c[1] == dict(current.settings)), None)


def _worth_changing(cost: Cost, present: Cost) -> bool:
    gain = present.total - cost.total
    return cost.total < _WORTH_CHANGING * present.total and gain > _WORTH_CHANGING_BY
