"""The worker that continues a chain: connecting to it, and measuring the way there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from time import monotonic
from typing import Any

from mesh_core import wire
from mesh_core.crossing.bandwidth import measure_one_way, plain_link
from mesh_core.errors import PeerLost, WireMalformed
from mesh_core.plugins.registry import Plugins
from mesh_core.transport.base import Address, Channel
from mesh_core.wire.failure import rebuild


def connect_next(following: Mapping[str, Any], plugins: Plugins, timeout: float) -> tuple[Channel, bytes]:
    """A channel to the worker that ``following`` names, and the session there.

    Args:
        following: ``address``, ``server_key`` and ``session``.
        timeout: seconds.

    Raises:
        WireMalformed: one of the three is missing.
        PluginNotFound: no transport for the scheme of the address.
        TransportError: see `Transport.connect`.
    """
    try:
        address, session = Address(following["address"], following["server_key"]), following["session"]
    except KeyError as error:
        raise WireMalformed(f"The next worker of a chain came without {error}.") from error
    return plugins.transport(address.scheme).connect_onward(address, timeout, wire.SENT_BACK), session


def measured_link(channel: Channel, within: float) -> dict[str, Any]:
    """How fast ``channel`` is in the direction that states take, as a message carries it.

    Args:
        within: seconds for the whole measurement, whatever the worker there says.

    Raises:
        PeerLost: the worker there does not answer in time.
        WireMalformed: it answers what was not asked.
    """
    end = monotonic() + within

    def send(nbytes: int) -> None:
        probe = wire.Probe(wire.next_id(), 0)
        channel.send(wire.pack(probe, [bytes(nbytes)] if nbytes else []))
        frames = channel.receive(max(end - monotonic(), 0.0))
        if frames is not None:
            answer, _ = wire.unpack(frames, wire.SENT_BACK)
            if isinstance(answer, wire.Failed):
                raise rebuild(answer)
            if not isinstance(answer, wire.Probed) or answer.id != probe.id:
                raise WireMalformed("The next worker answers something else than the probe that it got.")
            return
        raise PeerLost(f"The next worker does not answer probes within {within:g} s.")

    return plain_link(replace(measure_one_way(send), way=channel.way))
