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
from mesh_core.builtin import load_plugins
from mesh_core.host.remote import Remote
from mesh_core.loras.lora import Applied, Lora
from mesh_core.loras.read import lora_of_state
from mesh_core.model.library import Checkpoint
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Settings
from mesh_core.transport.base import Address
from mesh_core.transport.invites import accept_invite, create_invite
from mesh_core.transport.keys import KeyStore
from tests.faults.conftest import IMPATIENT, TALKATIVE, Case
from tests.support import loras
from tests.support.splitting import split
from tests.support.workers import mesh_home, wait_until

SLOWEST_PING = 1.0
"""Seconds."""

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
def honest_host(case: Case, address: str, plugins: Plugins, steps: int = 1) -> Iterator[Honest]:
    """This user generates and pings meanwhile; no step is sent again and no connection lost.

    Args:
        steps: that are computed at least.
    """
    met, enough = Honest(), threading.Event()

    def generate() -> None:
        with split(case.path, ":1", [address], plugins, settings=TALKATIVE) as runner:
            while not enough.is_set() or len(met.exact) < steps:
                met.exact.append(torch.equal(runner(case.inputs), case.expected))
            assert runner.stats.reconnects == 0 and not any(s.resent for s in runner.stats.steps)

    def ping() -> None:
        with connected(address, plugins) as remote:
            while not enough.is_set():
                asked = monotonic()
                remote.ask(wire.Ping(wire.next_id(), b""), wire.Pong, timeout=_ANSWERED_WITHIN)
                met.pings.append(monotonic() - asked)
                sleep(_PING_EVERY)

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(generate), pool.submit(ping)]
        wait_until(lambda: met.pings or running[1].done(), 20, "a first ping")
        try:
            yield met
        finally:
            enough.set()
            for thread in running:
                thread.result(_ANSWERED_WITHIN)


@contextmanager
def undisturbed(case: Case, address: str, plugins: Plugins, steps: int = 2) -> Iterator[None]:
    """An `honest_host` beside what a test does: every step is exact, every ping answered in time."""
    with honest_host(case, address, plugins, steps) as met:
        yield
    assert met.exact and all(met.exact)
    # One ping may fall into a pause of a busy machine.
    slow = sorted(met.pings)[-2:]
    assert slow[0] < SLOWEST_PING and slow[-1] < 3 * SLOWEST_PING, f"slowest of {len(met.pings)} pings: {slow}"


@contextmanager
def connected(address: str, plugins: Plugins) -> Iterator[Remote]:
    """A connection of this user's; what a test sends over it is a member's."""
    remote = Remote(Address(address), plugins, TALKATIVE)
    remote.connect()
    try:
        yield remote
    finally:
        remote.close()


@contextmanager
def member(address: str, home: Path, settings: Settings = TALKATIVE) -> Iterator[Remote]:
    """A connection of another user, who joined the worker at ``address``: what one user's programs take, they take from
    each other, so whom others are to be fair to is somebody else."""
    server_key = KeyStore().identity().server.public
    invite = str(create_invite(address))
    with mesh_home(home):
        accept_invite(invite)
        remote = Remote(Address(address, server_key), load_plugins(), settings)
        remote.connect()
    try:
        yield remote
    finally:
        remote.close()


def record(case: Case, address: str, plugins: Plugins, lora: Lora | None = None) -> list[list[bytes]]:
    """All that a host sends in one generation of two steps, the second one with ``lora``."""
    sent: list[list[bytes]] = []
    pack = wire.pack

    def recording(message: wire.Message, *arguments: Any) -> Any:
        frames = pack(message, *arguments)
        sent.append([bytes(f) for f in frames])
        return frames

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "pack", recording)
        with split(case.path, ":1", [address], plugins, settings=IMPATIENT) as runner:
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
