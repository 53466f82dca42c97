"""A step on its way over one leg: sent, not yet back.

A session waits for each before it starts the next; several at once would be several of these objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

import torch

from mesh_codec.errors import CodecCorrupt
from mesh_core import wire
from mesh_core.crossing.sequences import Turn
from mesh_core.crossing.stats import HopStats, StepStats
from mesh_core.crossing.streams import Payload
from mesh_core.errors import WireMalformed
from mesh_core.host.hops import Leg
from mesh_core.host.remote import Remote, await_answer
from mesh_core.host.request import Request
from mesh_core.host.results import Expected, check_result
from mesh_core.host.routes import RouteStats
from mesh_core.model.spec import State

_Answer = tuple[wire.Result, list[memoryview]]


@dataclass(frozen=True)
class Landed:
    """What came back, and what it cost.

    Attributes:
        crossed: on each route of the leg.
        wire_ms: on all of them together.
    """

    state: State
    crossed: list[RouteStats]
    wire_ms: float


@dataclass(frozen=True)
class Flight:
    """One step over one leg.

    Attributes:
        message: as the first worker got it; what comes back repeats its step and attempt.
        payload: the state that went with it.
        sent: when, by the performance counter.
        deadline: seconds that the workers have.
    """

    leg: Leg
    turn: Turn
    message: wire.Step
    payload: Payload
    sent: float
    deadline: float

    @classmethod
    def start(
        cls, leg: Leg, state: State, constants: Mapping[str, str], request: Request,
        *, turn: Turn, attempt: int, deadline: float,
    ) -> Flight:  # fmt: skip
        """Encode ``state`` and send it to the leg's first worker; returns at once.

        Args:
            constants: names -> hashes of what the workers have already.
            attempt: raised whenever a step is sent again.
        """
        first = leg.hops[0].remote
        payload = leg.encoder.encode(turn, state)
        message = wire.Step(
            id=wire.next_id(),
            session=first.session,
            step=turn.step,
            attempt=attempt,
            after=turn.after,
            sequence=turn.sequence,
            constants=dict(constants),
            options=dict(request.conditioning.options),
            tensors=payload.entries,
            trace=[],
            deadline_ms=int(deadline * 1e3),
        )
        sent = perf_counter()
        first.tell(message, payload.buffers)
        return cls(leg, turn, message, payload, sent, deadline)

    def land(self, device: torch.device, stats: StepStats, expected: Mapping[str, Expected]) -> Landed:
        """Wait for what the leg's last worker returns, on ``device``; its cost is added to ``stats``.

        Raises:
            PeerLost, TransportTimeout: see `await_answer`.
            WireMalformed: the result is not what was ``expected``, or the workers' reports do not fit the leg.
            CodecCorrupt: the result is damaged.
            MeshError: what a worker says went wrong.
        """
        remotes = [hop.remote for hop in self.leg.hops]
        what = f"step {self.message.step}"
        result, buffers = await_answer(remotes, self.message.id, self._answer, self.deadline, what)
        arrived = perf_counter()
        check_result(remotes[-1].name, result.tensors, expected)
        try:
            state = self.leg.decoder.decode(self.turn, result.tensors, buffers, device)
        except (WireMalformed, CodecCorrupt) as error:
            raise type(error)(f"{remotes[-1].name} answered wrongly: {error.message}", hint=error.hint) from error
        # Giving 33 MB back to the system takes milliseconds; they belong to the decoding.
        buffers.clear()
        decode_ms = (perf_counter() - arrived) * 1e3
        if len(result.trace) != len(remotes):
            raise WireMalformed(f"{len(result.trace)} workers report on a step of {len(remotes)}.")
        hops = [HopStats.from_trace(report) for report in result.trace]
        wire_ms = (arrived - self.sent) * 1e3 - sum(h.busy_ms for h in hops)
        stats.hops += hops
        stats.encode_ms += self.payload.ms
        stats.decode_ms += decode_ms
        stats.wire_ms += wire_ms
        return Landed(state, self.leg.crossed(self.payload, hops, decode_ms), wire_ms)

    def _answer(self, remote: Remote, answer: wire.Message, buffers: list[memoryview]) -> _Answer | None:
        """``answer`` if it is what this flight waits for."""
        last = self.leg.hops[-1].remote
        if not isinstance(answer, wire.Result) or remote is not last or answer.session != last.session:
            return None
        mine = (answer.step, answer.attempt) == (self.message.step, self.message.attempt)
        return (answer, buffers) if mine else None
