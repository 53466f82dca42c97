"""What an honest member notices while another one does harm: whether its steps are exact and its pings answered."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

import torch

from mesh_core import wire
from mesh_core.builtin import load_plugins
from mesh_core.host.remote import Remote
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Settings
from mesh_core.transport.base import Address
from mesh_core.transport.invites import accept_invite, create_invite
from mesh_core.transport.keys import KeyStore
from tests.faults.conftest import TALKATIVE, Case
from tests.support.splitting import split
from tests.support.workers import mesh_home, wait_until

SLOWEST_PING = 1.0
"""Seconds; one ping may fall into a pause of a busy machine."""


@contextmanager
def member(address: str, home: Path, settings: Settings = TALKATIVE) -> Iterator[Remote]:
    """A connection of another user, who joined the worker at ``address``."""
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


@contextmanager
def undisturbed(case: Case, address: str, plugins: Plugins, steps: int = 2) -> Iterator[None]:
    """Meanwhile this user opens a session, generates and pings: every step is exact, every ping answered in time.

    Args:
        steps: that are computed at least.
    """
    enough, exact, pings = threading.Event(), list[bool](), list[float]()

    def generate() -> None:
        with split(case.path, ":1", [address], plugins, settings=TALKATIVE) as runner:
            while not enough.is_set() or len(exact) < steps:
                exact.append(torch.equal(runner(case.inputs), case.expected))
            assert runner.stats.reconnects == 0 and not any(s.resent for s in runner.stats.steps)

    def ping() -> None:
        remote = Remote(Address(address), plugins, TALKATIVE)
        remote.connect()
        while not enough.is_set():
            began = monotonic()
            remote.ask(wire.Ping(wire.next_id(), b""), wire.Pong, timeout=30)
            pings.append(monotonic() - began)
            sleep(0.02)
        remote.close()

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(generate), pool.submit(ping)]
        wait_until(lambda: pings or running[1].done(), 20, "a first ping")
        try:
            yield
        finally:
            enough.set()
            for each in running:
                each.result(60)
    assert exact and all(exact)
    slow = sorted(pings)[-2:]
    assert slow[0] < SLOWEST_PING and slow[-1] < 3 * SLOWEST_PING, f"slowest of {len(pings)} pings: {slow}"
