"""Keys, invites, versions and checkpoints that do not fit: a named error, a hint, and a worker that goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import sleep, time

import pytest
import torch
from safetensors.torch import load_file, save_file

from mesh_core import wire
from mesh_core.builtin import load_plugins
from mesh_core.errors import (
    CheckpointMismatch,
    NotAuthorised,
    PlanError,
    PluginNotFound,
    SessionUnknown,
    Unreachable,
    WireMalformed,
    WireUnsupportedVersion,
)
from mesh_core.host.remote import Remote
from mesh_core.plugins.registry import Plugins
from mesh_core.testing.listeners import TransportRig
from mesh_core.transport.base import Address, Listener, Peer
from mesh_core.transport.invites import create_invite
from mesh_core.transport.keys import KeyStore
from tests.faults.conftest import IMPATIENT, Case
from tests.faults.processes import FastWorker, slow_model
from tests.support.splitting import split
from tests.support.workers import mesh_home

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli() -> Cli:
    """Runs ``mesh`` as the user whose MESH_HOME is ``home``."""

    def run(*arguments: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **({"MESH_HOME": str(home)} if home else {})}
        command = [sys.executable, "-m", "mesh_core.cli", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    return run


@pytest.fixture
def remote(steady: FastWorker, plugins: Plugins) -> Iterator[Remote]:
    """A greeted connection to a worker."""
    made = Remote(Address(steady.address), plugins, IMPATIENT)
    made.connect()
    yield made
    made.close()


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """What a command that was refused wrote."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "error: " in done.stderr and "try: " in done.stderr
    return done.stderr


def test_a_stranger_is_refused(steady: FastWorker, tmp_path: Path) -> None:
    server_key = KeyStore().identity().server.public
    with mesh_home(tmp_path):
        stranger = Remote(Address(steady.address, server_key), load_plugins(), IMPATIENT)
        with pytest.raises(NotAuthorised, match="does not accept this key") as caught:
            stranger.connect()
    assert "mesh join" in caught.value.hint


def test_a_worker_that_was_never_joined(steady: FastWorker, tmp_path: Path) -> None:
    with mesh_home(tmp_path), pytest.raises(Unreachable, match="was ever joined") as caught:
        # A user who never joined expects its own worker at an address of this machine.
        Remote(Address(steady.address), load_plugins(), IMPATIENT).connect()
    assert "mesh join" in caught.value.hint


def test_an_invite_works_once(steady: FastWorker, cli: Cli, tmp_path: Path) -> None:
    invite = str(create_invite(steady.address, name="studio"))
    done = cli("join", invite, home=tmp_path / "guest")
    assert done.returncode == 0, done.stderr
    text = refused(cli("join", invite, home=tmp_path / "other"))
    assert "works once" in text and "mesh keys invite" in text


def test_an_invite_expires(steady: FastWorker, cli: Cli, tmp_path: Path) -> None:
    invite = create_invite(steady.address, lifetime=1.0)
    sleep(max(0.0, invite.until - time()) + 0.1)
    assert "this one until" in refused(cli("join", str(invite), home=tmp_path))


def test_a_damaged_invite(steady: FastWorker, cli: Cli, tmp_path: Path) -> None:
    invite = str(create_invite(steady.address))
    assert "cut off" in refused(cli("join", invite.partition("&until")[0], home=tmp_path))


def test_revoking_a_key_ends_a_session_at_its_next_step(
    steady: FastWorker, quick: Case, cli: Cli, tmp_path: Path
) -> None:
    owner = Path(os.environ["MESH_HOME"])
    assert cli("join", str(create_invite(steady.address)), "--name", "guest", home=tmp_path).returncode == 0
    with mesh_home(tmp_path):
        plugins = load_plugins()
        with split(quick.path, ":1", [steady.address], plugins, settings=IMPATIENT) as runner:
            assert torch.equal(runner(quick.inputs), quick.expected)
            assert cli("keys", "revoke", "guest", home=owner).returncode == 0
            with pytest.raises(NotAuthorised, match="any more") as caught:
                runner(quick.inputs)
            assert "mesh join" in caught.value.hint
        with pytest.raises(NotAuthorised):
            Remote(Address(steady.address), plugins, IMPATIENT).connect()


def test_a_second_worker_at_the_same_port(steady: FastWorker, cli: Cli, model: Path) -> None:
    port = steady.address.rpartition(":")[2]
    text = refused(cli("serve", str(model.parent), "--port", port, "--device", "cpu"))
    assert port in text and "another port" in text


@pytest.mark.parametrize("where", ["hello", "envelope"])
def test_another_wire_version(
    steady: FastWorker, plugins: Plugins, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    ours = wire.VERSION
    if where == "hello":
        monkeypatch.setattr(wire, "VERSION", ours + 1)
    else:
        monkeypatch.setattr("mesh_core.wire.framing.VERSION", ours + 1)
    with pytest.raises(WireUnsupportedVersion, match=rf"version ({ours}|{ours + 1})") as caught:
        Remote(Address(steady.address), plugins, IMPATIENT).connect()
    assert "pip install --upgrade comfyui-mesh" in caught.value.hint


@pytest.mark.parametrize(("spoken", "answer"), [([1], 0), ([3, 4], 0), ([1, 2, 3], 2)])
def test_a_hello_of_other_versions(remote: Remote, spoken: list[int], answer: int) -> None:
    hello = wire.Hello(wire.next_id(), spoken, "9.9.9", {}, "desk")
    if answer:
        assert remote.ask(hello, wire.Welcome, timeout=5).wire == answer
    else:
        with pytest.raises(WireUnsupportedVersion, match=f"version {', '.join(map(str, spoken))}, this end"):
            remote.ask(hello, wire.Welcome, timeout=5)


def test_a_worker_that_answers_in_another_version_than_it_was_asked(plugins: Plugins) -> None:
    def lie(listener: Listener, peer: Peer, frames: list[memoryview]) -> None:
        hello, _ = wire.unpack(frames)
        welcome = wire.Welcome(hello.id, 3, "9.9.9", {}, "liar", "", {}, [], {})
        listener.send(peer.route, wire.pack(welcome))

    with TransportRig() as rig:
        serving = rig.serve(plugins.transport("mesh"), "mesh://127.0.0.1:0", lie)
        liar = Remote(serving.address, plugins, IMPATIENT)
        with pytest.raises(WireUnsupportedVersion, match="speaks wire version 3"):
            liar.connect()
        assert not liar.connected


def test_one_weight_differs(steady: FastWorker, quick: Case, plugins: Plugins, tmp_path: Path) -> None:
    mine = slow_model(tmp_path / "klein")
    (file,) = mine.glob("*.safetensors")
    weights = load_file(file)
    weights["proj_out.weight"].view(torch.int32)[3, 5] ^= 1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatch, match="same shapes, other weights") as caught:
        with split(mine, ":1", [steady.address], plugins):
            pass
    assert "w0" in caught.value.message and "same file" in caught.value.hint


def test_a_model_of_other_shapes(steady: FastWorker, plugins: Plugins, tmp_path: Path) -> None:
    mine = slow_model(tmp_path / "klein", singles=5)
    with pytest.raises(CheckpointMismatch, match="other klein models"), split(mine, ":1", [steady.address], plugins):
        pass


def request(quick: Case, plugins: Plugins, **changes: object) -> wire.Open:
    """A proper request to open the whole model, with some fields changed."""
    from mesh_core.programs.identity import identify
    from tests.support.splitting import checkpoint_at

    checkpoint = checkpoint_at(quick.path, plugins)
    identity, states = identify(checkpoint), checkpoint.spec.states
    raw = {"codec": "raw", "settings": {}}
    fields = {
        "session": b"r" * 16,
        "family": checkpoint.spec.family,
        "structure": identity.structure,
        "fingerprint": identity.fingerprint,
        "span": [0, checkpoint.spec.blocks],
        "dtype": "float32",
        "others": {},
        "arithmetic": {},
        "computed": None,
        "loras": [],
        "inputs": dict.fromkeys(states[0], raw),
        "outputs": dict.fromkeys(states[-1], raw),
        "next": None,
        "options": {},
    }
    return wire.Open(wire.next_id(), **{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"span": [0, 99]}, PlanError),
        ({"span": [5, 3]}, PlanError),
        ({"span": [4, 4]}, PlanError),
        ({"family": "wan"}, PluginNotFound),
        ({"dtype": "int64"}, PlanError),
        ({"inputs": {}}, WireMalformed),
        ({"outputs": {"secret": {"codec": "raw", "settings": {}}}}, WireMalformed),
        ({"inputs": {"latent": {"codec": "nonesuch", "settings": {}}}}, WireMalformed),
        ({"structure": "0" * 64}, CheckpointMismatch),
    ],
)
def test_a_request_that_cannot_be_met(
    remote: Remote, quick: Case, plugins: Plugins, changes: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error, match="w0"):
        remote.ask(request(quick, plugins, **changes), wire.Opened, timeout=20)
    assert isinstance(remote.ask(request(quick, plugins), wire.Opened, timeout=20), wire.Opened)


def test_a_session_belongs_to_the_host_that_opened_it(
    remote: Remote, quick: Case, plugins: Plugins, steady: FastWorker, cli: Cli, tmp_path: Path
) -> None:
    remote.ask(request(quick, plugins, session=b"m" * 16), wire.Opened, timeout=20)
    assert cli("join", str(create_invite(steady.address)), home=tmp_path).returncode == 0
    with mesh_home(tmp_path):
        other = Remote(Address(steady.address), load_plugins(), IMPATIENT)
        other.connect()
        with pytest.raises(SessionUnknown):
            other.ask(wire.Ping(wire.next_id(), b"m" * 16), wire.Pong, timeout=5)
        with pytest.raises(SessionUnknown):
            other.ask(request(quick, plugins, session=b"m" * 16), wire.Opened, timeout=20)
        other.close()
    assert remote.ask(wire.Ping(wire.next_id(), b"m" * 16), wire.Pong, timeout=5)
