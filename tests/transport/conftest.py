"""Transports of users with keys of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh_core.testing.listeners import ListenerThread, TransportRig
from mesh_core.transport.keys import KeyStore
from mesh_core.transport.zeromq import ZeroMqTransport

LOOPBACK = "mesh://127.0.0.1:0"


def port_of(serving: ListenerThread) -> int:
    return int(serving.address.text.partition("?")[0].rpartition(":")[2])


class Bench(TransportRig):
    """Makes transports of users, each with keys of their own, beside workers and channels; closes all of them."""

    def __init__(self, home: Path) -> None:
        super().__init__()
        self._home = home

    def keys(self, user: str) -> KeyStore:
        return KeyStore(self._home / user)

    def mesh(self, user: str = "owner", **options: object) -> ZeroMqTransport:
        transport = ZeroMqTransport(self.keys(user), **options)  # type: ignore[arg-type]
        self.owns(transport)
        return transport


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Bench(tmp_path) as made:
        yield made
