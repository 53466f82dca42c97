"""What every transport does, by the tests that everybody's transport has to pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh_core.testing import TRANSPORT_CHECKS, check_transport
from mesh_core.testing.transports import MakeTransport, TransportCheck
from mesh_core.transport.inproc import InprocTransport
from mesh_core.transport.keys import KeyStore
from mesh_core.transport.zeromq import ZeroMqTransport

ADDRESSES = {
    "inproc": "inproc://",
    "mesh": "mesh://127.0.0.1:0",
    "mesh-insecure": "mesh://127.0.0.1:0?insecure=yes",
}


@pytest.mark.parametrize("name", ADDRESSES)
@pytest.mark.parametrize("check", TRANSPORT_CHECKS, ids=lambda check: check.__name__)
def test_conformance(tmp_path: Path, name: str, check: TransportCheck) -> None:
    make: MakeTransport = InprocTransport
    if name != "inproc":
        make = lambda limits: ZeroMqTransport(KeyStore(tmp_path), limits=limits)  # noqa: E731
    check_transport(make, ADDRESSES[name], only=check)
