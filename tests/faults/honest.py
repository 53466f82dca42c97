"""An honest host beside whatever a test does to a worker, and connections to do it over."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import msgpack
import pytest
import torch

from mesh_core import wire
from mesh_core.host.remote import Remote
from mesh_core.loras.lora import Applied, Lora
from mesh_core.loras.read import lora_of_state
from mesh_core.model.library import Checkpoint
from mesh_core.plugins.registry import Plugins
from mesh_core.transport.base import Address, Channel
from mesh_core.transport.invites import accept_invite, create_invite
from mesh_core.transport.keys import KeyStore
from mesh_core.transport.zeromq import ZeroMqTransport
from tests.faults.conftest import IMPATIENT, TALKATIVE, Case
from tests.faults.processes import FastWorker
from tests.support import loras
from tests.support.splitting import split
from tests.support.workers import wait_until

_PING_EVERY = 0.05
_ANSWERED_WITHIN = 60.0


@dataclass
class Honest:
    """What an honest host met.

    Attributes:
        exact: of each step, whether its result was the undisturbed one.
        pings: seconds that each answer took.
    """

    exact: list[bool] = field(default_factory=list)
    pings: list[float] = field(default_factory=list)

    @property
    def slowest(self) -> float:
        """Seconds of the slowest ping."""
        return max(self.pings, default=0.0)


@contextmanager
def honest_host(case: Case, worker: FastWorker, plugins: Plugins) -> Iterator[Honest]:
    """A member that generates and pings meanwhile; no step of its is sent again and no connection lost."""
    met, enough = Honest(), threading.Event()

    def generate() -> None:
        with split(case.path, ":1", [worker.address], plugins, settings=TALKATIVE) as runner:
            while not enough.is_set():
                met.exact.append(torch.equal(runner(case.inputs), case.expected))
            assert runner.stats.reconnects == 0 and not any(s.resent for s in runner.stats.steps)

    def ping() -> None:
        with connected(worker, plugins) as remote:
            while not enough.is_set():
                asked = monotonic()
                remote.ask(wire.Ping(wire.next_id(), b""), wire.Pong, timeout=_ANSWERED_WITHIN)
                met.pings.append(monotonic() - asked)
                sleep(_PING_EVERY)

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(generate), pool.submit(ping)]
        wait_until(lambda: (met.exact and met.pings) or any(r.done() for r in running), 20, "a first step")
        met.pings.clear()
        try:
            yield met
        finally:
            enough.set()
            for thread in running:
                thread.result(_ANSWERED_WITHIN)


@contextmanager
def connected(worker: FastWorker, plugins: Plugins) -> Iterator[Remote]:
    """A connection of this user's; what a test sends over it is a member's."""
    remote = Remote(Address(worker.address), plugins, IMPATIENT)
    remote.connect()
    try:
        yield remote
    finally:
        remote.close()


@contextmanager
def another_member(worker: FastWorker, folder: Path) -> Iterator[Channel]:
    """A connection of another user, who joined with an invite: what one user's programs take, they take from each
    other, so who is to be fair to others is somebody else."""
    keys = KeyStore(folder)
    accept_invite(str(create_invite(worker.address)), keys=keys)
    with _connection(worker, keys) as channel:
        yield channel


@contextmanager
def _connection(worker: FastWorker, keys: KeyStore) -> Iterator[Channel]:
    transport = ZeroMqTransport(keys)
    channel = transport.connect(Address(worker.address, KeyStore().identity().server.public), 5)
    try:
        yield channel
    finally:
        channel.close()
        transport.close()


def record(case: Case, worker: FastWorker, plugins: Plugins, lora: Lora | None = None) -> list[list[bytes]]:
    """All that a host sends in one generation of two steps, the second one with ``lora``."""
    sent: list[list[bytes]] = []
    pack = wire.pack

    def recording(message: wire.Message, *arguments: Any) -> Any:
        frames = pack(message, *arguments)
        sent.append([bytes(f) for f in frames])
        return frames

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "pack", recording)
        with split(case.path, ":1", [worker.address], plugins, settings=IMPATIENT) as runner:
            runner(case.inputs)
            assert runner.session is not None
            if lora is not None:
                runner.session.set_loras([Applied(lora)])
            runner(case.inputs)
            (remote,) = runner.session.remotes
            remote.ask(wire.Ping(wire.next_id(), remote.session), wire.Pong, timeout=5)
            remote.tell(wire.Cancel(wire.next_id(), remote.session, 1))
    return sent


def some_lora(model: Checkpoint) -> Lora:
    """A small LoRA of the model's last blocks."""
    shapes = {n.removesuffix(".weight"): tuple(p.shape) for n, p in model.spec.parameters.items() if "mlp_proj" in n}
    return lora_of_state(loras.peft(dict(sorted(shapes.items())[-2:])), model, "some", {})


def kinds(recorded: list[list[bytes]]) -> dict[str, list[bytes]]:
    """The last message of each type."""
    return {msgpack.unpackb(frames[0])["t"]: frames for frames in recorded}
