"""A session: the remote part of one model, as the host runs it step by step.

The state goes to the first worker, from worker to worker, and from the last one back. A worker that cannot reach
its neighbour is relayed through the host. A lost worker is waited for; then everything is opened again and the
step is sent once more. It is predicted from the last step whose result came, as it was at first, so a generation ends
with the result that it would have had; where a worker lost that step, from nothing: within the quality.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from time import perf_counter

from mesh_codec.base import Encoded
from mesh_codec.errors import CodecStateLost, CodecUnsupported
from mesh_core import wire
from mesh_core.crossing.constants import ConstantsBook
from mesh_core.crossing.stats import RunStats, StepStats
from mesh_core.errors import PeerLost, SessionError, TransportError
from mesh_core.host.flight import Flight
from mesh_core.host.hops import Leg, RemoteHop
from mesh_core.host.loras import AnyLora, SessionLoras
from mesh_core.host.opening import Opener
from mesh_core.host.options import ModelIdentity, SessionOptions
from mesh_core.host.progress import ProgressReport
from mesh_core.host.recovery import GONE, MAX_REPAIRS, RESENT, Recovery
from mesh_core.host.remote import Remote
from mesh_core.host.request import Request, Requests
from mesh_core.host.results import ExpectedTensor, expected_at
from mesh_core.host.routes import Route, codec_name_of, reason_of
from mesh_core.model.spans import BlockSpan
from mesh_core.model.spec import Conditioning, State
from mesh_core.plugins.registry import Plugins
from mesh_core.system.logs import logger

log = logger(__name__)


class Session:
    """Remote spans of one model. Used from one thread at a time.

    Args:
        identity: the model.
        hops: workers and their spans in execution order, following each other without gaps.
        options: see `SessionOptions`.
        report: told about loading, LoRAs on their way and lost workers.
    """

    def __init__(
        self,
        identity: ModelIdentity,
        hops: Sequence[tuple[Remote, BlockSpan]],
        options: SessionOptions,
        plugins: Plugins,
        report: ProgressReport | None = None,
    ) -> None:
        self.identity, self.options, self.plugins = identity, options, plugins
        self.stats = RunStats()
        self._hops = [RemoteHop(remote, span, identity.spec.constants_of(span)) for remote, span in hops]
        for remote in self.remotes:
            remote.watch = options.watch
        self._legs: list[Leg] = []
        self._routes: list[Route] = []
        self._loras = SessionLoras(identity, plugins, options.settings, self.stats, report)
        self._opener = Opener(identity, self._hops, options, plugins, self._loras, report)
        self._recovery = Recovery(self.remotes, options, self.stats, self._open, report)
        self._book = ConstantsBook(plugins.codec("raw"))
        self._requests = Requests(self._book, identity.spec.states[hops[0][1].start])
        self._step = 0
        self._attempt_number = 0
        self._lock = threading.Lock()
        self._process = os.getpid()

    @property
    def remotes(self) -> list[Remote]:
        """The workers in execution order."""
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
                self._recovery.recover(error)
        except BaseException:
            self.close()
            raise

    def _open(self, within: float | None = None) -> None:
        self._opener.connect(within)
        self._agree(anew=False)

    def _agree(self, *, anew: bool) -> None:
        """``anew``: with the codecs that pay now; else with those in use, so that what was lost is mended exactly."""
        # While workers agree on something new, what they agreed on before is no more.
        self._legs = []
        self._legs, continued = self._opener.agree(anew=anew)
        self._routes = [route for leg in self._legs for route in leg.routes]
        if not continued:
            self._requests.sequences.restart(broken=not anew)

    def set_loras(self, loras: Sequence[AnyLora]) -> None:
        """Run the remote spans with exactly ``loras`` from the next step on. Raises as `SessionLoras.adjust` does."""
        self._refuse_in_a_fork()
        with self._lock:
            self._loras.wanted = tuple(loras)
            try:
                self._loras.adjust([hop for hop in self._hops if hop.remote.holds_session])
            except BaseException:
                self._legs = []  # nothing is computed with a part of a set: the next step opens the session anew
                raise

    def _refuse_in_a_fork(self) -> None:
        """Connections and threads do not survive a fork, and a lock may be held for ever.

        Raises:
            SessionError: this process is a copy of the one that opened the session.
        """
        if self._forked:
            raise SessionError(
                "This process was forked from the one that split the model, and has no connection to its workers.",
                hint="split() again in this process, or in one that was started with 'spawn'",
            )

    @property
    def _forked(self) -> bool:
        return os.getpid() != self._process

    def close(self) -> None:
        """Let the workers forget the session; they keep the weights while they have room. May be called twice.

        In a forked process, nothing happens: the session is its parent's.
        """
        if self._forked:
            return
        for hop in self._hops:
            if hop.remote.holds_session:
                try:
                    hop.remote.tell(wire.Close(wire.next_id(), hop.remote.session))
                except TransportError as error:
                    log.debug("%s was gone when its session was closed: %s", hop.remote.name, error)
            hop.remote.close()
        self._opener.close()
        self._book.close()
        self._legs = []

    def begin(self) -> None:
        """A new generation: nothing of it is coded as a change of what came before."""
        self._requests.sequences.forget()

    def run(self, state: State, conditioning: Conditioning, *, sequence: str = "", local_ms: float = 0.0) -> State:
        """One step: the state at the first remote cut in, the state at the last one out.

        Args:
            sequence: a name for one of several interleaved runs. Runs with other constants (conditional and
                unconditional passes, other prompts, other sizes) are told apart without it.
            local_ms: what the host's own span took, for the stats.

        Raises:
            PeerLost: a worker went away and did not come back in time.
            TransportTimeout: the step's deadline passed.
            SessionError: this process is a fork of the one that opened the session.
            MeshError: what a worker says went wrong.
        """
        self._refuse_in_a_fork()
        with self._lock:
            self._step += 1
            step = StepStats(self._step, local_ms=local_ms)
            self.plugins.hook.mesh_step_started(step=self._step)
            began = perf_counter()
            try:
                result = self._run(self._requests.new(state, conditioning, sequence), step)
            except BaseException as error:
                self._cancel()
                self.plugins.hook.mesh_step_failed(step=self._step, error=error)
                raise
            step.total_ms = (perf_counter() - began) * 1e3
            step.codec, step.reason = codec_name_of(self._routes), reason_of(self._routes)
            self.stats.steps.append(step)
            self.plugins.hook.mesh_step_finished(step=self._step, stats=step)
            return result

    def _run(self, request: Request, stats: StepStats) -> State:
        """The step, sent again while its errors can be mended."""
        repairs = 0
        while True:
            self._attempt_number += 1
            try:
                self._make_ready(request.state)
                return self._attempt(request, stats)
            except CodecUnsupported as error:
                if not self._opener.codecs.retreat():
                    raise
                log.warning("step %d is sent again, and all is sent uncoded from here on: %s", self._step, error)
                self._legs = []
            except (*GONE, *RESENT) as error:
                repairs += 1
                if repairs > MAX_REPAIRS:
                    raise
                log.warning("step %d is sent again: %s", self._step, error)
                if isinstance(error, GONE):
                    self._recovery.recover(error)
                if isinstance(error, CodecStateLost):
                    self._requests.sequences.restart(request.sequence, broken=True)
            stats.resent += 1
            for hop in self._hops:
                hop.sent.clear()

    def _make_ready(self, state: State) -> None:
        """Open what is not open, and have the state cross as it pays now."""
        if not self._legs:
            self._open()
        if self._opener.links.doubtful:
            self._opener.links.measure_again(self.remotes)
        if self._opener.codecs.outdated(self._routes, state):
            self._agree(anew=True)

    def _attempt(self, request: Request, stats: StepStats) -> State:
        """Send the step over every leg, one after the other."""
        stats.hops.clear()
        sequences = self._requests.sequences
        turn = sequences.turn(request.sequence, self._step)
        stats.restarted = sequences.broken(request.sequence) and any(route.memory != "none" for route in self._routes)
        names = self._send_constants(request)
        state, deadline = request.state, self.options.settings.deadlines.step
        try:
            for leg in self._legs:
                flight = Flight.start(
                    leg, state, names, request, turn=turn, attempt=self._attempt_number, deadline=deadline
                )
                landed = flight.land(self.options.device, stats, self._expected(leg, state, request))
                self._opener.links.observe(landed.crossed, landed.wire_ms)
                self._opener.speeds.observe(landed.crossed)
                state = landed.state
        except BaseException:
            if any(route.memory == "reset" for route in self._routes):
                # What such codecs have seen of this step they cannot take back.
                sequences.restart(request.sequence, broken=True)
            raise
        sequences.heard(turn)
        return state

    def _expected(self, leg: Leg, state: State, request: Request) -> dict[str, ExpectedTensor]:
        spec, cut = self.identity.spec, leg.hops[-1].span.stop
        adapter = self.plugins.adapter(spec.family)
        return expected_at(cut, leg.hops[0].span.start, state, request.conditioning, spec, adapter)

    def _send_constants(self, request: Request) -> dict[str, str]:
        """Names of the constants that the workers need, each sent to those that do not have it."""
        names: dict[str, str] = {}
        for hop in self._hops:
            missing: dict[str, Encoded] = {}
            for name in hop.constants:
                if name not in request.constants and name in self.identity.spec.optional:
                    continue
                names[name], coded = request.constants[name]
                if names[name] not in hop.sent and names[name] not in missing:
                    missing[names[name]] = coded or self._book.encode(request.conditioning.constants[name])
            if missing:
                self.stats.constants_bytes += hop.send_constants(missing, self.options.settings.deadlines.step)
        return names

    def _cancel(self) -> None:
        for remote in self.remotes:
            if remote.holds_session:
                try:
                    remote.tell(wire.Cancel(wire.next_id(), remote.session, self._step))
                except TransportError as error:
                    log.debug("%s was gone when its step was cancelled: %s", remote.name, error)
