"""What every transport does, by the tests that everybody's transport has to pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh_core.testing import TRANSPORT_CHECKS, check_transport
from mesh_core.testing.transports import MakeTransport, TransportCheck
from mesh_core.transport.inproc import InprocTransport
from mesh_core.transport.keys import KeyStore
from mesh_core.transport.memory_link import ROOM
from mesh_core.transport.zeromq import ZeroMqTransport

ADDRESSES = {
    "inproc": "inproc://",
    "mesh": "mesh://127.0.0.1:0",
    "mesh-without-memory": "mesh://127.0.0.1:0",
    "mesh-little-memory": "mesh://127.0.0.1:0",
    "mesh-insecure": "mesh://127.0.0.1:0?insecure=yes",
}

SHARED = {"mesh-without-memory": 0, "mesh-little-memory": 256 << 10}
"""Bytes that ends may share; else as much as they do by themselves."""


@pytest.mark.parametrize("name", ADDRESSES)
@pytest.mark.parametrize("check", TRANSPORT_CHECKS, ids=lambda check: check.__name__)
def test_conformance(tmp_path: Path, name: str, check: TransportCheck) -> None:
    make: MakeTransport = InprocTransport
    if name != "inproc":
        shared = SHARED.get(name, ROOM)
        make = lambda limits: ZeroMqTransport(KeyStore(tmp_path), limits=limits, shared=shared)  # noqa: E731
    check_transport(make, ADDRESSES[name], only=check)
