"""Slow links, shaped: each has the rate that it was asked for, and every row of the table is a whole step."""

from __future__ import annotations

import socket
import subprocess
import threading
from contextlib import suppress
from time import perf_counter

import pytest

from benchmarks.link import Workload, measure, rows, table, with_ratios
from benchmarks.networks import namespaces_possible, shaped
from benchmarks.shaper import Shaper
from mesh_core.errors import ConfigError


def _swallow(server: socket.socket, total: int) -> None:
    """Take ``total`` bytes, then say so."""
    connection, _ = server.accept()
    with connection, suppress(OSError):
        taken = 0
        while taken < total and (data := connection.recv(1 << 20)):
            taken += len(data)
        connection.sendall(b"!")


@pytest.mark.parametrize("rate", [2e6, 10e6])
def test_a_relay_lets_through_what_the_rate_allows(rate: float) -> None:
    total = int(rate * 0.4)
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_swallow, args=(server, total), daemon=True).start()
        with Shaper("127.0.0.1", server.getsockname()[1], rate) as link:
            with socket.create_connection(("127.0.0.1", link.port)) as sender:
                began = perf_counter()
                sender.sendall(bytes(total))
                assert sender.recv(1) == b"!"
                # A busy machine makes it slower; nothing may make it faster.
                assert perf_counter() - began > 0.36


def test_a_relay_to_nobody_hangs_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with Shaper("127.0.0.1", port, 1e6) as link:
        with socket.create_connection(("127.0.0.1", link.port), timeout=10) as sender:
            assert sender.recv(1) == b""


def test_a_rate_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError), shaped(0):
        pass


def _namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout


def test_where_the_system_can_it_makes_namespaces_and_leaves_none() -> None:
    with shaped(1e6, relay=not namespaces_possible()) as network:
        if namespaces_possible():
            assert network.host_prefix[-1] in _namespaces()
        else:
            assert network.kind == "relay in user space"
    if namespaces_possible():
        assert network.host_prefix[-1] not in _namespaces()


def test_all_settings_make_whole_steps() -> None:
    workload = Workload("small", steps=1, shape=(1, 64, 1024))
    found = list(measure("1gbit", workload, relay=True))
    assert [row["name"] for row in found] == [row["name"] for row in rows(["raw", "lossless"])]
    assert not [row for row in found if "failed" in row]
    by_name = {row["name"]: row for row in found}
    assert by_name["raw"]["of_raw"] == 1 and by_name["raw"]["used"] == "raw"
    assert by_name["fast"]["there_mb"] < by_name["balanced"]["there_mb"] < by_name["transparent"]["there_mb"]
    assert by_name["raw"]["state_mb"] == pytest.approx(64 * 1024 * 2 / 1e6)
    assert with_ratios(found)[0]["against_raw"] == 1
    text = table(found)
    assert "relay in user space" in text and by_name["auto fast"]["reason"] in text
