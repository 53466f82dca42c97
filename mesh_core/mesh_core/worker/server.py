"""A worker: one process that hosts stages for many hosts.

Four kinds of thread: the one that calls `Worker.serve` owns the listener and answers at once whatever needs no
computing; two load stages; one takes in LoRAs; one computes, each session in turn. Nothing that arrives may stop any
of them.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mesh_core import __version__, wire
from mesh_core.crossing.codec_speed import SpeedBook
from mesh_core.errors import NotAuthorised, WireMalformed, WireTooLarge, WireUnsupportedVersion
from mesh_core.loras.library import own_library
from mesh_core.model.library import CheckpointLibrary
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Settings
from mesh_core.system.device import free_memory, label
from mesh_core.transport.base import Frame, Listener, Peer
from mesh_core.wire.failure import describe
from mesh_core.worker.executor import Executor
from mesh_core.worker.session import QUOTA
from mesh_core.worker.sessions import Hosting
from mesh_core.worker.stages import StageStore

log = logging.getLogger(__name__)

_TICK = 0.25
"""Seconds between looks at sessions whose host may be gone."""

_Handler = Callable[[Peer, Any, list[memoryview]], None]


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
        self._device = torch.device(options.device)
        self._executor = Executor(QUOTA.steps)
        budget = options.memory if options.memory is not None else free_memory(self._device)
        self.stages = StageStore(self._device, budget, self._executor.check)
        self.library = CheckpointLibrary(options.roots, plugins)
        self.speeds = SpeedBook(self._device)
        self.hosting = Hosting(
            name=options.name,
            device=self._device,
            settings=options.settings,
            plugins=plugins,
            library=self.library,
            stages=self.stages,
            executor=self._executor,
            listener=listener,
            speeds=self.speeds,
            send=self._send,
            fail=self._fail,
            lora_library=own_library(options.settings, options.loras),
            preset=options.preset,
        )
        # Of its own, so that what arrives over a slow link and what loads do not wait for each other.
        self._receiver = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lora")
        self._loader = ThreadPoolExecutor(max_workers=2, thread_name_prefix="load")
        self._requests: Counter[str] = Counter()
        self._requests_lock = threading.Lock()
        self._stopping = threading.Event()
        hosting, loras = self.hosting, self.hosting.loras
        self._handlers: dict[type[wire.Message], _Handler] = {
            wire.Hello: lambda p, m, b: self._hello(p, m),
            wire.Enrol: lambda p, m, b: self._enrol(p, m),
            wire.Catalogue: lambda p, m, b: self._load(p, m, lambda: self._catalogue(p, m)),
            wire.Open: lambda p, m, b: self._load(p, m, lambda: hosting.open(p, m)),
            wire.Admit: lambda p, m, b: hosting.admit(p, m),
            wire.Constants: hosting.keep_constants,
            wire.Step: hosting.step,
            wire.Cancel: lambda p, m, b: hosting.cancel(p, m),
            wire.Close: lambda p, m, b: hosting.close(p, m),
            wire.Ping: lambda p, m, b: self._ping(p, m),
            wire.Shelf: lambda p, m, b: self._load(p, m, lambda: loras.listing(p, m)),
            wire.Discard: lambda p, m, b: self._load(p, m, lambda: loras.discard(p, m)),
            wire.Seek: lambda p, m, b: self._load(p, m, lambda: loras.seek(p, m)),
            wire.Offer: lambda p, m, b: self._load(p, m, lambda: loras.offer(p, m), self._receiver),
            wire.Chunk: lambda p, m, b: self._load(p, m, lambda: loras.chunk(p, m, b), self._receiver),
            wire.Adjust: lambda p, m, b: self._load(p, m, lambda: loras.adjust(p, m)),
            wire.Probe: self._probe,
        }

    def serve(self) -> None:
        """Answer messages until `stop`; returns when everything is closed."""
        survey = threading.Thread(target=self._survey, name="codec-speed", daemon=True)
        survey.start()
        while not self._stopping.is_set():
            got = self.listener.receive(_TICK)
            if got is not None:
                self._dispatch(*got)
            self.hosting.stop_orphans()
        self._executor.stop()
        for threads in (self._loader, self._receiver):
            threads.shutdown(wait=True, cancel_futures=True)
        self.hosting.close_all()
        self.listener.close()
        self.speeds.close()
        survey.join()

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
            message, buffers = wire.unpack(frames)
            self._check_trust(peer, message)
            handler = self._handlers.get(type(message))
            if handler is None:
                raise WireMalformed(f"A worker does not take {type(message).__name__} messages.")
            handler(peer, message, buffers)
        except Exception as error:
            log.info("refused what %s sent: %s", peer.key or "a peer", error)
            self._fail(peer.route, message, error)

    def _check_trust(self, peer: Peer, message: wire.Message) -> None:
        if peer.trust == "member":
            return
        allowed = (wire.Enrol,) if peer.trust == "enrolling" else (wire.Step, wire.Probe)
        if not isinstance(message, (wire.Hello, wire.Ping, *allowed)):
            raise NotAuthorised(
                f"A key that is only {peer.trust} here may not send {type(message).__name__}.", hint="mesh join INVITE"
            )

    def _hello(self, peer: Peer, message: wire.Hello) -> None:
        if wire.VERSION not in message.wire:
            raise WireUnsupportedVersion(
                f"{self.options.name} (comfyui-mesh {__version__}) speaks wire version {wire.VERSION}, "
                f"{message.name} (comfyui-mesh {message.package}) speaks {message.wire}.",
                hint="pip install --upgrade comfyui-mesh on the older side",
            )
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
        self._send(peer.route, welcome)

    def _device_report(self) -> dict[str, Any]:
        return {
            "device": str(self._device),
            "name": label(self._device),
            "budget": self.stages.budget,
            "loaded": self.stages.nbytes,
            "sessions": len(self.hosting),
            "speeds": self.speeds.plain(),
        }

    def _enrol(self, peer: Peer, message: wire.Enrol) -> None:
        self.listener.enrol(peer, message.key, message.name)
        self._send(peer.route, wire.Enrolled(message.id, self.options.name))

    def _catalogue(self, peer: Peer, message: wire.Catalogue) -> None:
        self._send(peer.route, wire.Catalogued(message.id, self.library.catalogue()))

    def _ping(self, peer: Peer, message: wire.Ping) -> None:
        self.hosting.seen(peer, message.session)
        self._send(peer.route, wire.Pong(message.id))

    def _probe(self, peer: Peer, message: wire.Probe, buffers: list[memoryview]) -> None:
        if message.size and peer.trust != "member":
            raise NotAuthorised("Only a member may ask for bytes back.", hint="mesh join INVITE")
        if sum(b.nbytes for b in buffers) > wire.PROBE_BYTES:
            raise WireTooLarge(f"A probe carries more than {wire.PROBE_BYTES} bytes.")
        self._send(peer.route, wire.Probed(message.id), [bytes(message.size)])

    def _load(
        self, peer: Peer, message: wire.Message, work: Callable[[], None], threads: ThreadPoolExecutor | None = None
    ) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                log.info("%s failed: %s", type(message).__name__, error)
                self._fail(peer.route, message, error)
            finally:
                with self._requests_lock:
                    self._requests -= Counter([peer.key])

        with self._requests_lock:
            if self._requests[peer.key] >= QUOTA.requests:
                raise WireTooLarge(f"{QUOTA.requests} requests of one host wait already.", hint="wait for the answers")
            self._requests[peer.key] += 1
        (threads or self._loader).submit(run)

    def _send(self, route: bytes, message: wire.Message, buffers: list[Frame] | None = None) -> None:
        self.listener.send(route, wire.pack(message, buffers or []))

    def _fail(self, route: bytes, message: wire.Message | None, error: BaseException) -> None:
        step = message if isinstance(message, wire.Step) else None
        failed = wire.Failed(
            id=message.id if message is not None else 0,
            session=getattr(message, "session", b""),
            step=step.step if step is not None else 0,
            worker=self.options.name,
            **describe(error),
        )
        if failed.traceback:
            log.error("%s", failed.traceback)
        self._send(route, failed)
