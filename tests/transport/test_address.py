"""Addresses as people write them: what means the same worker reaches it, and what means nothing says so."""

from __future__ import annotations

import pytest

from mesh_core.errors import ConfigError
from mesh_core.testing.listeners import ask
from mesh_core.transport.address import parse_place
from mesh_core.transport.base import Address
from mesh_core.transport.invites import accept_invite, create_invite, parse_invite
from mesh_core.transport.keys import KnownWorker

from .conftest import Bench

WAYS = ["{}", " {}\n", "mesh://{}", "  mesh://{} ", "MESH://{}", "Mesh://{}/", "\tmesh://{}/"]


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_to_write_an_address_reach_the_worker(bench: Bench, way: str) -> None:
    serving = bench.serve(bench.mesh(), "mesh://127.0.0.1:0")
    written = way.format(serving.address.text.removeprefix("mesh://"))
    assert Address(written).scheme == "mesh"
    assert ask(bench.connect(bench.mesh(), Address(written)), [b"x"]) == [b"x"]


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_to_write_an_address_name_the_known_worker(bench: Bench, way: str) -> None:
    keys = bench.keys("guest")
    for host in ("attic.lan", "[fe80::a%eth0]"):
        keys.remember(KnownWorker(f"{host}:7801", "k" * 40, "attic"))
        assert [w.name for w in keys.forget(way.format(f"{host}:7801"))] == ["attic"]
    assert keys.workers() == []


def test_a_name_in_capitals_is_the_same_machine(bench: Bench) -> None:
    serving = bench.serve(bench.mesh(), "mesh://127.0.0.1:0")
    invite = create_invite(serving.address.text.replace("127.0.0.1", "Attic.LAN"), keys=bench.keys("owner"))
    assert invite.place == parse_place(f"ATTIC.lan:{invite.place.port}")
    assert parse_invite(str(invite).replace("mesh://", "MESH://")) == invite
    assert parse_invite(str(invite).replace("mesh://", " ")) == invite


def test_an_insecure_worker_is_written_in_the_same_ways() -> None:
    for way in ("127.0.0.1:7801?insecure=yes", " MESH://127.0.0.1:7801/?insecure=yes "):
        assert str(parse_place(way)) == "mesh://127.0.0.1:7801?insecure=yes"


def test_an_invite_in_place_of_an_address_is_called_one_and_not_repeated(bench: Bench) -> None:
    invite = create_invite("mesh://127.0.0.1:7801", keys=bench.keys("owner"))
    with pytest.raises(ConfigError, match="is an invite, no address") as told:
        parse_place(str(invite))
    assert "mesh join" in told.value.hint
    assert str(invite).partition("token=")[2][:40] not in str(told.value)


@pytest.mark.parametrize("text", ["", " ", "mesh:127.0.0.1:7801", "::1", "attic and cellar", "a:b", "/models"])
def test_what_names_no_machine_says_how_one_is_written(text: str) -> None:
    with pytest.raises(ConfigError) as told:
        parse_place(text)
    assert "mesh://HOST:PORT" in told.value.hint


def test_an_invite_that_another_scheme_carries_is_none() -> None:
    with pytest.raises(ConfigError, match="is not an invite"):
        accept_invite("https://127.0.0.1:7801?token=x")
