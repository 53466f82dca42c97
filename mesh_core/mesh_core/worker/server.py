"""A worker: one process that computes stages for many hosts.

The thread that calls `Worker.serve` owns the listener and answers at once whatever needs no computing; some load
stages, some hash constants, one takes in LoRAs (`mesh_core.worker.requests`); one computes, each member in turn; one
finds out at the start how fast codecs are here. Nothing that arrives may stop any of them, and none of them keeps the
worker from stopping.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from mesh_core import __version__, wire
from mesh_core.crossing.speed_book import SpeedBook
from mesh_core.errors import NotAuthorised, WireMalformed, WireTooLarge
from mesh_core.loras.library import own_library
from mesh_core.model.library import CheckpointLibrary
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Settings
from mesh_core.system.device import free_memory, label
from mesh_core.system.logs import logger
from mesh_core.transport.base import Listener, Peer, Trust
from mesh_core.worker.constants import ConstantsCache
from mesh_core.worker.executor import Executor
from mesh_core.worker.inbox import Inbox
from mesh_core.worker.loras import WorkerLoras
from mesh_core.worker.opening import SessionOpener
from mesh_core.worker.probes import ProbeAnswers
from mesh_core.worker.quota import QUOTA
from mesh_core.worker.replies import Replies
from mesh_core.worker.requests import FairThreads, RequestThreads
from mesh_core.worker.sessions import WorkerSessions
from mesh_core.worker.stages import StageStore
from mesh_core.worker.steps import WorkerSteps

__all__ = ["Worker", "WorkerOptions"]

log = logger(__name__)

_TICK = 0.25
"""Seconds between looks at sessions whose host may be gone."""

_LIMITS: Mapping[Trust, wire.MessageLimits] = {
    "member": wire.REQUEST,
    "neighbour": wire.HANDED_OVER,
    "enrolling": wire.GREETING,
}
"""What a message may hold, by who sent it: they are read before it is known what they are."""

_ENDS_WITHIN = 5.0
"""Seconds that all threads together have to end when the worker stops."""


@dataclass(frozen=True)
class _Handler:
    """Who answers one kind of message.

    Attributes:
        answer: called with peer and message.
        threads: where it runs; None: at once, in the thread of the listener.
        buffers: whether it is given the message's buffers too.
        in_order: what one host asks of one session is answered in the order in which it came: of two sets of LoRAs, the
            later one must stay.
    """

    answer: Callable[..., Iterator[None] | None]
    threads: FairThreads | None = None
    buffers: bool = False
    in_order: bool = False


@dataclass(frozen=True)
class WorkerOptions:
    """What a worker is started with.

    Attributes:
        roots: folders and files with checkpoints.
        device: a torch device, for example ``"cuda:0"``.
        memory: bytes for weights; None for most of what is free now.
        client_key: the public key under which this worker connects to others.
        loras: folders and files with LoRAs of the user's own.
        preset: names of LoRAs, and strengths, that every session has before its own.
    """

    roots: tuple[Path, ...]
    name: str = "worker"
    device: str = "cpu"
    memory: int | None = None
    client_key: str = ""
    settings: Settings = field(default_factory=Settings)
    loras: tuple[Path, ...] = ()
    preset: tuple[tuple[str, float], ...] = ()


class Worker:
    """Serves one listener until `stop` is called.

    Args:
        options: see `WorkerOptions`.
        listener: where hosts and neighbours reach this worker; closed at the end.
        plugins: adapters, codecs and transports.
    """

    def __init__(self, options: WorkerOptions, listener: Listener, plugins: Plugins) -> None:
        self.options, self.listener, self.plugins = options, listener, plugins
        name, settings = options.name, options.settings
        self._device = torch.device(options.device)
        self._executor = executor = Executor(QUOTA.steps)
        budget = options.memory if options.memory is not None else free_memory(self._device)
        self.stages = stages = StageStore(self._device, budget, executor.check)
        self.library = library = CheckpointLibrary(options.roots, plugins)
        self.speeds = SpeedBook(self._device)
        self.replies = replies = Replies(listener, name)
        self.loras = loras = WorkerLoras(own_library(settings, options.loras), library, replies, options.preset)
        self.sessions = sessions = WorkerSessions(name, settings, stages, executor, listener, loras, replies)
        self.opener = SessionOpener(settings, plugins, library, stages, executor, loras, sessions, self.speeds, replies)
        constants = ConstantsCache(self._device, settings.worker.constants_cache)
        longest = settings.deadlines.step
        self.steps = WorkerSteps(name, self._device, longest, plugins, sessions, constants, executor, replies)
        self._requests = RequestThreads(replies)
        self._inbox = Inbox(listener, lambda peer, error: replies.fail(peer.route, None, error))
        self._probes = ProbeAnswers()
        self._stopping = threading.Event()
        self._handlers = self._table()

    def _table(self) -> dict[type[wire.Message], _Handler]:
        """Every kind of message that a worker takes; a new one needs a line here and somebody who answers it."""
        loading, receiving, hashing = self._requests.loading, self._requests.receiving, self._requests.hashing
        return {
            wire.Hello: _Handler(self._hello),
            wire.Enrol: _Handler(self._enrol),
            wire.Ping: _Handler(self._ping),
            wire.Probe: _Handler(self._probe, buffers=True),
            wire.Catalogue: _Handler(self._catalogue, loading),
            wire.Open: _Handler(self.opener.open, loading, in_order=True),
            wire.Adjust: _Handler(self.opener.adjust, loading, in_order=True),
            wire.Admit: _Handler(self.sessions.admit),
            wire.Close: _Handler(self.sessions.close),
            wire.Constants: _Handler(self.steps.keep_constants, hashing, buffers=True),
            wire.Step: _Handler(self.steps.queue, buffers=True),
            wire.Cancel: _Handler(self.steps.cancel),
            wire.ListLoras: _Handler(self.loras.listing, loading),
            wire.Discard: _Handler(self.loras.discard, loading),
            wire.Seek: _Handler(self.loras.seek, loading),
            wire.Offer: _Handler(self.loras.offer, receiving),
            wire.Chunk: _Handler(self.loras.chunk, receiving, buffers=True),
        }

    def serve(self) -> bool:
        """Answer messages until `stop`; returns when everything is closed.

        Returns whether all threads have ended. One that hangs, in a file system that does not answer or in a library,
        is left behind after a while, and what it uses stays open.
        """
        survey = threading.Thread(target=self._survey, name="codec-speed", daemon=True)
        survey.start()
        while not self._stopping.is_set():
            self._inbox.read_one(_TICK, self._dispatch)
            self.sessions.stop_orphans()
            self.steps.report_losses()
        end = monotonic() + _ENDS_WITHIN
        self._requests.stop()
        self.speeds.close()
        computed = self._executor.stop(_ENDS_WITHIN)
        if computed:
            # Their channels are the computing thread's for as long as it runs.
            self.sessions.close_all()
        loaded = self._requests.join(end - monotonic())
        self.listener.close()
        survey.join(max(end - monotonic(), 0.0))
        return computed and loaded and not survey.is_alive()

    def stop(self) -> None:
        """Make `serve` return soon. Any thread may call it."""
        self._stopping.set()
        self.listener.wake()

    def _survey(self) -> None:
        """Find out how fast codecs are here, so that hosts can be told."""
        for codec in self.plugins.codecs().values():
            if not self._stopping.is_set():
                self.speeds.survey([codec])

    def _dispatch(self, peer: Peer, frames: list[memoryview]) -> None:
        message: wire.Message | None = None
        try:
            message, buffers = wire.unpack(frames, _LIMITS[peer.trust])
            self._check_trust(peer, message)
            handler = self._handlers.get(type(message))
            if handler is None:
                raise WireMalformed(f"A worker does not take {type(message).__name__} messages.")
            answer = partial(handler.answer, peer, message, *([buffers] if handler.buffers else []))
            if handler.threads is None:
                answer()
            else:
                line = getattr(message, "session", b"") if handler.in_order else b""
                self._requests.submit(handler.threads, peer, message, answer, sum(b.nbytes for b in buffers), line)
        except Exception as error:
            log.info("refused what %s sent: %s", peer.key or "a peer", error)
            self.replies.fail(peer.route, message, error)

    def _check_trust(self, peer: Peer, message: wire.Message) -> None:
        if peer.trust == "member":
            return
        allowed = (wire.Enrol,) if peer.trust == "enrolling" else (wire.Step, wire.Probe)
        if not isinstance(message, (wire.Hello, wire.Ping, *allowed)):
            raise NotAuthorised(
                f"A key that is only {peer.trust} here may not send {type(message).__name__}.", hint="mesh join INVITE"
            )

    def _hello(self, peer: Peer, message: wire.Hello) -> None:
        wire.check_versions(message.wire)
        welcome = wire.Welcome(
            id=message.id,
            wire=wire.VERSION,
            package=__version__,
            plugins=self.plugins.versions(),
            name=self.options.name,
            client_key=self.options.client_key,
            codecs={name: codec.capabilities() for name, codec in self.plugins.codecs().items()},
            devices=[self._device_report()],
            adapters=self.plugins.adapter_versions(),
        )
        self.replies.send(peer.route, welcome)

    def _device_report(self) -> dict[str, Any]:
        return {
            "device": str(self._device),
            "name": label(self._device),
            "budget": self.stages.memory.budget,
            "loaded": self.stages.nbytes,
            "sessions": len(self.sessions),
            "speeds": self.speeds.plain(),
        }

    def _enrol(self, peer: Peer, message: wire.Enrol) -> None:
        self.listener.enrol(peer, message.key, message.name)
        self.replies.send(peer.route, wire.Enrolled(message.id, self.options.name))

    def _catalogue(self, peer: Peer, message: wire.Catalogue) -> None:
        self.replies.send(peer.route, wire.Catalogued(message.id, self.library.catalogue()))

    def _ping(self, peer: Peer, message: wire.Ping) -> None:
        self.sessions.seen(peer, message.session)
        self.replies.send(peer.route, wire.Pong(message.id))

    def _probe(self, peer: Peer, message: wire.Probe, buffers: list[memoryview]) -> None:
        if message.size and peer.trust != "member":
            raise NotAuthorised("Only a member may ask for bytes back.", hint="mesh join INVITE")
        if sum(b.nbytes for b in buffers) > wire.PROBE_BYTES:
            raise WireTooLarge(f"A probe carries more than {wire.PROBE_BYTES} bytes.")
        self.replies.send(peer.route, wire.Probed(message.id), [self._probes.make(peer.key, message.size)])
