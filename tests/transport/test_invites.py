"""Joining by one paste: an invite works once, for a while, at the worker that made it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh_core import wire
from mesh_core.errors import ConfigError, NotAuthorised, Unreachable
from mesh_core.testing.listeners import ListenerThread, ask
from mesh_core.transport.address import Place
from mesh_core.transport.base import Address, Listener, Peer
from mesh_core.transport.curve import new_key_pair
from mesh_core.transport.invites import Invite, accept_invite, advertised, create_invite, parse_invite

from .conftest import Bench

KEY, SECRET = new_key_pair()
INVITE = Invite(Place("10.0.0.7", 7777), KEY, SECRET, 2_000_000_000, "blue & grün's #1")


def enrolling(listener: Listener, peer: Peer, frames: list[memoryview]) -> None:
    """A worker's part: enrol who may, echo to members."""
    if peer.trust == "member":
        listener.send(peer.route, frames)
        return
    message, _ = wire.unpack(frames)
    assert isinstance(message, wire.Enrol)
    try:
        listener.enrol(peer, message.key, message.name)
        answer: wire.Message = wire.Enrolled(message.id, "blue")
    except NotAuthorised as error:
        answer = wire.Failed(message.id, b"", 0, "NotAuthorised", error.message, error.hint, "blue", "")
    listener.send(peer.route, wire.pack(answer))


def worker_and_invite(bench: Bench, lifetime: float = 60) -> tuple[ListenerThread, Invite]:
    serving = bench.serve(bench.mesh(), "mesh://127.0.0.1:0", enrolling)
    return serving, create_invite(serving.address.text, name="blue", lifetime=lifetime, keys=bench.keys("owner"))


def test_a_guest_joins_and_is_a_member_from_then_on(bench: Bench) -> None:
    serving, invite = worker_and_invite(bench)
    guest = bench.mesh("guest")
    worker = accept_invite(f"  {invite}\n", keys=bench.keys("guest"), transport=guest, name="desk")
    assert (f"mesh://{worker.address}", worker.name) == (serving.address.text, "blue")
    assert ask(bench.connect(guest, Address(serving.address.text)), [b"x"]) == [b"x"]
    assert serving.peers[-1].trust == "member"
    assert [client.name for client in bench.keys("owner").clients()] == ["desk"]
    assert bench.keys("owner").invites() == []


def test_a_used_invite_opens_nothing_to_anybody(bench: Bench) -> None:
    _, invite = worker_and_invite(bench)
    accept_invite(str(invite), keys=bench.keys("guest"))
    for user in ("thief", "guest"):
        with pytest.raises(NotAuthorised, match="works once") as caught:
            accept_invite(str(invite), keys=bench.keys(user))
        assert "mesh keys invite" in caught.value.hint
    assert bench.keys("thief").workers() == []


def test_two_that_hold_the_same_invite_do_not_both_get_in(bench: Bench) -> None:
    _, invite = worker_and_invite(bench)
    pairs = [bench.keys(user).identity().client for user in ("first", "second")]
    address = Address(str(invite.place), invite.server_key)
    transport = bench.mesh("guest")
    with_token = replace(pairs[0], public=bench.keys("owner").invites()[0].key, secret=invite.token)
    channels = [transport.connect(address, 5, client=with_token) for _ in pairs]
    try:
        first = ask(channels[0], wire.pack(wire.Enrol(1, pairs[0].public, "first")))
        assert isinstance(wire.unpack(first)[0], wire.Enrolled)
        channels[1].send(wire.pack(wire.Enrol(1, pairs[1].public, "second")))
        with pytest.raises(NotAuthorised):
            channels[1].receive(10)
    finally:
        for channel in channels:
            channel.close()
    assert [client.name for client in bench.keys("owner").clients()] == ["first"]


def test_an_expired_invite_is_refused_by_the_worker(bench: Bench) -> None:
    _, invite = worker_and_invite(bench)
    store = bench.keys("owner")
    store.invite(store.invites()[0].key, "blue", time() - 1)
    lying = replace(invite, until=int(time()) + 9999)
    with pytest.raises(NotAuthorised):
        accept_invite(str(lying), keys=bench.keys("guest"))


def test_an_invite_to_another_workers_address_is_refused(bench: Bench) -> None:
    _, invite = worker_and_invite(bench)
    other = bench.serve(bench.mesh("impostor"), "mesh://127.0.0.1:0", enrolling)
    moved = replace(invite, place=replace(invite.place, port=int(other.address.text.rpartition(":")[2])))
    with pytest.raises(Unreachable, match="not the key that is expected") as caught:
        accept_invite(str(moved), keys=bench.keys("guest"), timeout=1)
    assert "new invite" in caught.value.hint
    assert not other.peers


def test_who_came_in_without_an_invite_cannot_enrol_others(bench: Bench) -> None:
    serving, _ = worker_and_invite(bench)
    with pytest.raises(NotAuthorised):
        serving.listener.enrol(Peer(b"r", bench.keys("owner").identity().client.public), KEY, "x")


def test_an_invite_survives_a_shell_and_hides_its_token() -> None:
    assert parse_invite(str(INVITE)) == INVITE
    assert shlex.split(f'mesh join "{INVITE}"') == ["mesh", "join", str(INVITE)]
    assert re.fullmatch(r"[A-Za-z0-9:/?&=._%~\-\[\]]+", str(INVITE))
    assert SECRET not in repr(INVITE)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "mesh://10.0.0.7:7777",
        str(INVITE)[:-20].rpartition("&")[0],
        str(INVITE).replace("until=2", "until=x"),
        str(INVITE).replace("until=2000000000", "until=-5"),
        str(INVITE).replace("mesh://", "http://"),
        str(INVITE).replace("key=", "key=A"),
        str(INVITE).replace(":7777", ":99999"),
        str(INVITE) + "&token=x",
        str(INVITE) + "&colour=red",
        str(INVITE) + "%0a",
        str(INVITE)[:90],
    ],
)
def test_what_is_no_whole_invite_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_invite(text)


@given(st.text(max_size=80), st.integers(0, 200))
@settings(max_examples=200, deadline=None)
def test_any_text_is_an_invite_or_a_setting_to_correct(text: str, where: int) -> None:
    for candidate in (text, str(INVITE)[:where] + text + str(INVITE)[where:], "mesh://a?" + text):
        try:
            parse_invite(candidate)
        except ConfigError as error:
            assert SECRET not in str(error)


def test_no_invites_to_a_worker_without_encryption(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs no invites"):
        create_invite("mesh://10.0.0.7?insecure=yes")


def test_an_advertised_address_is_one_that_others_can_use() -> None:
    assert advertised("mesh://10.0.0.7:1") == "mesh://10.0.0.7:1"
    assert "0.0.0.0" not in advertised("mesh://0.0.0.0:7777")
    assert advertised("mesh://0.0.0.0:7777").endswith(":7777")


def mesh(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mesh_core.cli", *arguments],
        env={**os.environ, "MESH_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_inviting_joining_listing_and_revoking_on_the_command_line(bench: Bench, tmp_path: Path) -> None:
    owner_home, guest_home = tmp_path / "a", tmp_path / "b"
    bench._home = owner_home  # the command line keeps keys in HOME/config
    serving = bench.serve(bench.mesh("config"), "mesh://127.0.0.1:0", enrolling)
    invited = mesh(owner_home, "keys", "invite", "--address", serving.address.text, "--name", "blue")
    text = shlex.split(invited.stdout)[2]
    joined = mesh(guest_home, "join", text, "--name", "desk")
    assert joined.returncode == 0, joined.stderr
    assert "Joined blue" in joined.stdout and serving.address.text in joined.stdout
    again = mesh(tmp_path / "c", "join", text)
    assert again.returncode != 0 and "works once" in again.stderr
    listed = mesh(owner_home, "keys", "list").stdout
    assert "desk" in listed
    assert "blue" in mesh(guest_home, "keys", "list", "--json").stdout
    assert "Revoked desk" in mesh(owner_home, "keys", "revoke", "desk").stdout
    assert "desk" not in mesh(owner_home, "keys", "list").stdout
    assert "Forgot blue" in mesh(guest_home, "keys", "forget", "blue").stdout
    assert mesh(guest_home, "keys", "forget", "blue").returncode != 0
