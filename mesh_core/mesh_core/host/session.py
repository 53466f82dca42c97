"""A session: the remote part of one model, as the host runs it step by step.

The state goes to the first worker, from worker to worker, and from the last one back. A worker that cannot reach
its neighbour is relayed through the host. A lost worker is waited for; then everything is opened again and the
step is sent once more, so a generation ends with the result that it would have had.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from time import monotonic, perf_counter, sleep, strftime

from mesh_codec.base import DecodeLimits, Encoded
from mesh_codec.dtypes import from_torch
from mesh_codec.errors import CodecStateLost, CodecUnsupported
from mesh_core import wire
from mesh_core.crossing.constants import ConstantsBook
from mesh_core.crossing.stats import HopStats, RunStats, StepStats
from mesh_core.crossing.streams import Streams
from mesh_core.errors import (
    Cancelled,
    ConstantsMissing,
    MeshError,
    NotAuthorised,
    PeerLost,
    SessionUnknown,
    TransportError,
    TransportTimeout,
    Unreachable,
    WireMalformed,
)
from mesh_core.host.hops import CannotReachNeighbour, Identity, Leg, RemoteHop
from mesh_core.host.hops import SessionOptions as SessionOptions
from mesh_core.host.loras import AnyLora, LoraDesk
from mesh_core.host.negotiation import Negotiation
from mesh_core.host.remote import Remote, await_answer
from mesh_core.host.request import Request, Requests
from mesh_core.host.ways import Way
from mesh_core.model.spans import BlockSpan
from mesh_core.model.spec import Conditioning, State
from mesh_core.plugins.registry import Plugins

log = logging.getLogger(__name__)

Report = Callable[[str, str, int, int], None]
"""Called with a worker's name, what it does, bytes done and bytes in total while stages load."""

_MAX_REPAIRS = 3
"""How often a step is sent again before its error is the caller's."""

_RETRY_PAUSE = 0.2
"""Seconds between two attempts to reach a lost worker."""

_LEAST_CONNECT = 1.0
"""Seconds that an attempt has, however little is left of the time to wait for a lost worker; the first one has as much,
and each later one twice what the one before had."""


class Session:
    """Remote spans of one model. Used from one thread at a time.

    Args:
        identity: the model.
        hops: workers and their spans in execution order, following each other without gaps.
        options: see `SessionOptions`.
        report: told about loading.
    """

    def __init__(
        self,
        identity: Identity,
        hops: Sequence[tuple[Remote, BlockSpan]],
        options: SessionOptions,
        plugins: Plugins,
        report: Report | None = None,
    ) -> None:
        self.identity, self.options, self.plugins = identity, options, plugins
        self.stats = RunStats()
        self._hops = [RemoteHop(remote, span) for remote, span in hops]
        for remote in self.remotes:
            remote.watch = options.watch
        self._relayed: set[int] = set()
        self._report = report
        self._legs: list[Leg] = []
        self._codecs = Negotiation(
            identity.spec,
            plugins,
            dtype=options.dtype,
            device=options.device,
            quality=options.quality,
            codec=options.codec,
        )
        self._book = ConstantsBook(plugins.codec("raw"))
        self._requests = Requests(self._book, identity.spec.states[hops[0][1].start])
        self._step = 0
        self._epoch = 0
        self._lock = threading.Lock()
        self._loras = LoraDesk(identity, plugins, options.settings, self.stats, report)

    @property
    def remotes(self) -> list[Remote]:
        return [hop.remote for hop in self._hops]

    def open(self) -> None:
        """Connect to every worker and have it load its span; one that goes away meanwhile is waited for.

        Raises:
            TransportError, CheckpointError, PlanError, PluginError: named by the worker that it concerns.
        """
        try:
            try:
                self._open()
            except PeerLost as error:
                log.warning("opening starts again: %s", error)
                self._recover(error)
        except BaseException:
            self.close()
            raise

    def set_loras(self, loras: Sequence[AnyLora]) -> None:
        """Run the remote spans with exactly ``loras`` from the next step on. Raises as `LoraDesk.adjust` does."""
        with self._lock:
            self._loras.wanted = tuple(loras)
            try:
                self._loras.adjust([hop for hop in self._hops if hop.remote.opened])
            except BaseException:
                self._legs.clear()  # nothing is computed with a part of a set: the next step opens the session anew
                raise

    def close(self) -> None:
        """Let the workers forget the session; they keep the weights while they have room. May be called twice."""
        for hop in self._hops:
            if hop.remote.opened:
                try:
                    hop.remote.tell(wire.Close(wire.next_id(), hop.remote.session))
                except TransportError as error:
                    log.debug("%s was gone when its session was closed: %s", hop.remote.name, error)
            hop.remote.close()
        self._codecs.close()
        self._book.close()
        self._legs.clear()

    def begin(self) -> None:
        """A new generation: nothing of it is coded as a change of what came before."""
        self._restart_streams()

    def run(self, state: State, conditioning: Conditioning, *, sequence: str = "", local_ms: float = 0.0) -> State:
        """One step: the state at the first remote cut in, the state at the last one out.

        Args:
            sequence: a name for one of several interleaved runs. Runs with other constants (conditional and
                unconditional passes, other prompts, other sizes) are told apart without it.
            local_ms: what the host's own span took, for the stats.

        Raises:
            PeerLost: a worker went away and did not come back in time.
            TransportTimeout: the step's deadline passed.
            MeshError: what a worker says went wrong.
        """
        with self._lock:
            self._step += 1
            step = StepStats(self._step, local_ms=local_ms)
            self.plugins.hook.mesh_step_started(step=self._step)
            began = perf_counter()
            try:
                result = self._run(self._requests.new(state, conditioning, sequence), step)
            except BaseException as error:
                self._cancel()
                self._restart_streams()
                self.plugins.hook.mesh_step_failed(step=self._step, error=error)
                raise
            step.total_ms = (perf_counter() - began) * 1e3
            step.codec, step.reason = self._codecs.codec_name, self._codecs.reason
            self.stats.steps.append(step)
            self.plugins.hook.mesh_step_finished(step=self._step, stats=step)
            return result

    # Opening

    def _open(self, within: float | None = None) -> None:
        """``within``: seconds for each connection; the deadline that is set when None."""
        for hop in self._hops:
            if not hop.remote.connected:
                hop.remote.connect(within)
            if not hop.remote.measured:
                self._codecs.connected(hop.remote)
            hop.sent.clear()
            self._loras.connected(hop)
        self._agree()

    def _agree(self) -> None:
        """Have every worker hold its span ready, with the codecs that pay now."""
        while True:
            self._legs = self._arrange()
            try:
                for leg in reversed(self._legs):
                    self._open_leg(leg)
                return
            except CannotReachNeighbour as error:
                log.warning("%s; its state goes through this machine instead", error)
                self._relayed.add(error.hop)

    def _arrange(self) -> list[Leg]:
        starts = [0, *sorted(i for i in self._relayed if 0 < i < len(self._hops))] if self._hops else []
        groups = [self._hops[a:b] for a, b in zip(starts, [*starts[1:], len(self._hops)], strict=True)]
        codecs, limits = self.plugins.codecs(), DecodeLimits()
        legs = []
        self._codecs.begin()
        for group in groups:
            ends = [None, *(hop.remote for hop in group), None]
            cuts = [*(hop.span.start for hop in group), group[-1].span.stop]
            ways = [self._codecs.choose(cut, a, b) for cut, a, b in zip(cuts, ends, ends[1:], strict=False)]
            streams = [Streams(way.choices, codecs, limits) for way in (ways[0], ways[-1])]
            legs.append(Leg(group, ways, *streams))
        return legs

    def _open_leg(self, leg: Leg) -> None:
        following: RemoteHop | None = None
        for hop, inputs, outputs in reversed(list(zip(leg.hops, leg.ways, leg.ways[1:], strict=False))):
            if following is not None:
                admit = wire.Admit(wire.next_id(), following.remote.session, hop.remote.welcome.client_key)
                following.remote.ask(admit, wire.Ok, timeout=self.options.settings.deadlines.connect)
            self._open_hop(hop, inputs, outputs, following)
            following = hop

    def _open_hop(self, hop: RemoteHop, inputs: Way, outputs: Way, following: RemoteHop | None) -> None:
        remote, target = hop.remote, following.remote if following is not None else None
        measure = target is not None and not self._codecs.knows(remote, target)
        dtype = from_torch(self.options.dtype).name
        message = hop.request(self.identity, dtype, inputs.choices, outputs.choices, following, measure=measure)

        def progress(p: wire.Progress) -> None:
            if self._report is not None:
                self._report(remote.name, p.phase, p.done, p.total)

        try:
            answer = remote.ask(
                message, wire.Opened, timeout=self.options.settings.deadlines.load, on_progress=progress
            )
        except (Unreachable, NotAuthorised) as error:
            if following is None:
                raise
            raise CannotReachNeighbour(self._hops.index(following), error) from error
        self._codecs.opened(remote, target, answer.info)
        remote.opened = True

    # Steps

    def _run(self, request: Request, stats: StepStats) -> State:
        repairs = 0
        while True:
            try:
                if not self._legs:
                    self._open()
                if self._codecs.doubtful:
                    self._codecs.measure_again(self.remotes)
                if self._codecs.outdated(request.state):
                    self._agree()
                return self._attempt(request, stats)
            except CodecUnsupported as error:
                if not self._codecs.retreat():
                    raise
                log.warning("step %d is sent again, and all is sent uncoded from here on: %s", self._step, error)
                self._legs.clear()
            except (PeerLost, Unreachable, SessionUnknown, Cancelled, ConstantsMissing, CodecStateLost) as error:
                # Only a worker cancels here: it took this host for gone while the machine slept.
                repairs += 1
                if repairs > _MAX_REPAIRS:
                    raise
                log.warning("step %d is sent again: %s", self._step, error)
                if isinstance(error, (PeerLost, Unreachable, SessionUnknown)):
                    self._recover(error)
            stats.resent += 1
            for hop in self._hops:
                hop.sent.clear()
            self._restart_streams()

    def _restart_streams(self) -> None:
        """The next message starts at a key frame, whatever arrived of the last one."""
        self._epoch += 1
        for leg in self._legs:
            leg.encoder.reset()
            leg.decoder.reset()

    def _recover(self, cause: MeshError) -> None:
        """Reconnect and reopen everything; workers that kept the stage answer at once."""
        began, deadlines = monotonic(), self.options.settings.deadlines
        since, state = strftime("%H:%M:%S"), cause.message
        self.stats.reconnects += 1
        attempt = _LEAST_CONNECT
        while True:
            if self.options.watch is not None:
                self.options.watch()
            waited = monotonic() - began
            if self._report is not None:
                self._report(state, "waiting for it to come back", int(waited), int(deadlines.reconnect))
            for remote in self.remotes:
                remote.close()
            try:
                self._open(min(deadlines.connect, attempt, max(deadlines.reconnect - waited, _LEAST_CONNECT)))
                return
            except (PeerLost, Unreachable, TransportTimeout, SessionUnknown) as error:
                waited = monotonic() - began
                if waited > deadlines.reconnect:
                    raise PeerLost(
                        f"{cause.message} It has been away since {since} ({waited:.0f} s): {error.message}",
                        hint="mesh serve on that machine again, mesh doctor to test the way there, or run without it",
                    ) from error
                state = error.message
            attempt *= 2
            sleep(_RETRY_PAUSE)

    def _attempt(self, request: Request, stats: StepStats) -> State:
        stats.hops.clear()
        names = self._send_constants(request)
        state = request.state
        for leg in self._legs:
            state = self._run_leg(leg, state, names, request, stats)
        return state

    def _send_constants(self, request: Request) -> dict[str, str]:
        """Names of the constants that the workers need, each sent to those that do not have it."""
        names: dict[str, str] = {}
        for hop in self._hops:
            missing: dict[str, Encoded] = {}
            for name in self.identity.spec.constants_of(hop.span):
                if name not in request.constants and name in self.identity.spec.optional:
                    continue
                names[name], coded = request.constants[name]
                if names[name] not in hop.sent and names[name] not in missing:
                    missing[names[name]] = coded or self._book.encode(request.conditioning.constants[name])
            if missing:
                self.stats.constants_bytes += hop.send_constants(missing, self.options.settings.deadlines.step)
        return names

    def _run_leg(self, leg: Leg, state: State, names: Mapping[str, str], request: Request, stats: StepStats) -> State:
        first, last = leg.hops[0].remote, leg.hops[-1].remote
        deadline = self.options.settings.deadlines.step
        payload = leg.encoder.encode(request.sequence, state)
        message = wire.Step(
            id=wire.next_id(),
            session=first.session,
            step=self._step,
            attempt=self._epoch,
            sequence=request.sequence,
            constants=dict(names),
            options=dict(request.conditioning.options),
            tensors=payload.entries,
            trace=[],
            deadline_ms=int(deadline * 1e3),
        )
        sent = perf_counter()
        first.tell(message, payload.buffers)

        def wanted(
            remote: Remote, answer: wire.Message, buffers: list[memoryview]
        ) -> tuple[wire.Result, list[memoryview]] | None:
            if not isinstance(answer, wire.Result) or remote is not last or answer.session != last.session:
                return None
            return (answer, buffers) if (answer.step, answer.attempt) == (self._step, self._epoch) else None

        remotes = [hop.remote for hop in leg.hops]
        result, buffers = await_answer(remotes, message.id, wanted, deadline, f"step {self._step}")
        arrived = perf_counter()
        decoded = leg.decoder.decode(request.sequence, result.tensors, buffers, self.options.device)
        # Giving 33 MB back to the system takes milliseconds; they belong to the decoding.
        buffers.clear()
        decode_ms = (perf_counter() - arrived) * 1e3
        if len(result.trace) != len(leg.hops):
            raise WireMalformed(f"{len(result.trace)} workers report on a step of {len(leg.hops)}.")
        hops = [HopStats.from_trace(report) for report in result.trace]
        wire_ms = (arrived - sent) * 1e3 - sum(h.busy_ms for h in hops)
        stats.hops += hops
        stats.encode_ms += payload.ms
        stats.decode_ms += decode_ms
        stats.wire_ms += wire_ms
        self._codecs.observe(leg.crossed(payload, hops, decode_ms), wire_ms)
        return decoded

    def _cancel(self) -> None:
        for remote in self.remotes:
            if remote.opened:
                try:
                    remote.tell(wire.Cancel(wire.next_id(), remote.session, self._step))
                except TransportError as error:
                    log.debug("%s was gone when its step was cancelled: %s", remote.name, error)
