"""The sessions of a worker: who may use them, what a changed span costs, and when they end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_bytes
from time import sleep
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from mesh_core import wire
from mesh_core.builtin import load_plugins
from mesh_core.errors import (
    CheckpointMismatch,
    ConstantsMissing,
    MeshError,
    NotAuthorised,
    PeerLost,
    PlanDoesNotFit,
    PlanError,
    PluginNotFound,
    SessionUnknown,
    WireMalformed,
)
from mesh_core.host.remote import Remote, await_answer
from mesh_core.model import fingerprint
from mesh_core.model.sizes import span_bytes
from mesh_core.model.spans import BlockSpan
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Settings, WorkerSettings
from mesh_core.transport.base import Address, Channel, Frames
from mesh_core.transport.keys import KeyStore
from mesh_core.worker import opening
from tests.adapters import tiny
from tests.support.splitting import checkpoint_at, split
from tests.support.workers import ThreadWorker, mesh_home, thread_workers, wait_until

SETTINGS = Settings()
RAW = {"codec": "raw", "settings": {}}


@pytest.fixture
def plugins() -> Plugins:
    return load_plugins()


@pytest.fixture(params=["inproc", "mesh"])
def worker(request: pytest.FixtureRequest, path: Path, plugins: Plugins) -> Iterator[ThreadWorker]:
    with thread_workers(path.parent, 1, request.param, plugins=plugins) as workers:
        yield workers[0]


class Host:
    """A host that speaks to a worker message by message."""

    def __init__(self, worker: ThreadWorker, plugins: Plugins, path: Path, server_key: str = "") -> None:
        self.checkpoint = checkpoint_at(path, plugins)
        self.remote = Remote(Address(worker.address, server_key), plugins, SETTINGS)
        self.remote.connect()

    def opening(self, span: str = "1:5", session: bytes | None = None) -> wire.Open:
        spec = self.checkpoint.spec
        cut = spec.span(span)
        return wire.Open(
            id=wire.next_id(),
            session=session or self.remote.session,
            family=spec.family,
            structure=fingerprint.structure(spec),
            fingerprint=fingerprint.of_checkpoint(self.checkpoint.header, spec),
            span=[cut.start, cut.stop],
            dtype="float32",
            others={},
            arithmetic={},
            computed=None,
            loras=[],
            inputs=dict.fromkeys(spec.states[cut.start], RAW),
            outputs=dict.fromkeys(spec.states[cut.stop], RAW),
            next=None,
            options={},
        )

    def ask(self, message: wire.Message, reply: type[wire.Message] = wire.Ok) -> wire.Message:
        return self.remote.ask(message, reply, timeout=20)

    def open(self, span: str = "1:5", session: bytes | None = None) -> dict[str, object]:
        opened = self.ask(self.opening(span, session), wire.Opened)
        assert isinstance(opened, wire.Opened)
        return opened.info


@pytest.fixture
def host(worker: ThreadWorker, plugins: Plugins, path: Path) -> Iterator[Host]:
    host = Host(worker, plugins, path)
    yield host
    host.remote.close()


def size(host: Host, span: str) -> int:
    return span_bytes(host.checkpoint.spec, host.checkpoint.spec.span(span), 4)


def test_a_session_that_changes_its_span_loads_or_frees_the_difference_only(host: Host, worker: ThreadWorker) -> None:
    assert host.open("2:5")["bytes_read"] == size(host, "2:5")
    assert host.open("1:5")["bytes_read"] == size(host, "1:5") - size(host, "2:5")
    assert host.open("3:5")["bytes_read"] == 0
    assert len(worker.worker.sessions) == 1
    users = {str(key.span): n for key, n in worker.worker.stages.table.users().items()}
    assert users == {"2:5": 0, "1:5": 0, "3:5": 1}


def test_two_sessions_share_a_stage(host: Host) -> None:
    host.open("1:5", b"a" * 16)
    assert host.open("1:5", b"b" * 16)["bytes_read"] == 0


REFUSED: dict[str, tuple[dict[str, object], type[MeshError]]] = {
    "another fingerprint": ({"fingerprint": "0" * 64}, CheckpointMismatch),
    "another structure": ({"structure": "0" * 64}, CheckpointMismatch),
    "a family without an adapter": ({"family": "wan"}, PluginNotFound),
    "a family without a model here": ({"family": "flux2"}, CheckpointMismatch),
    "a span past the end": ({"span": [1, 6]}, PlanError),
    "an empty span": ({"span": [2, 2]}, PlanError),
    "a span backwards": ({"span": [3, 1]}, PlanError),
    "a type that no model computes in": ({"dtype": "int64"}, PlanError),
    "an unknown codec": ({"inputs": {"hidden_states": {"codec": "nvenc", "settings": {}}}}, WireMalformed),
    "a missing tensor": ({"inputs": {"hidden_states": RAW}}, WireMalformed),
}


@pytest.mark.parametrize(("change", "error"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_opened_is_refused_by_name_and_the_next_request_is_served(
    host: Host, change: dict[str, object], error: type[MeshError]
) -> None:
    with pytest.raises(error) as caught:
        host.ask(replace(host.opening(), **change), wire.Opened)
    assert "w0" in str(caught.value)
    assert host.open()["loaded"] == size(host, "1:5")


def test_a_mismatch_says_what_is_here_instead(host: Host) -> None:
    with pytest.raises(CheckpointMismatch, match="same shapes, other weights: klein"):
        host.ask(replace(host.opening(), fingerprint="0" * 64), wire.Opened)


def test_a_refused_change_of_span_leaves_the_session_as_it_was(
    path: Path, plugins: Plugins, worker: ThreadWorker
) -> None:
    inputs = tiny.inputs(guidance=False)
    with split(path, ":1", [worker], plugins) as run:
        expected = run(inputs)
        assert run.session is not None
        (remote,) = run.session.remotes
        host = Host(worker, plugins, path)
        opening = host.opening("2:5", remote.session)
        with pytest.raises(PlanError):
            remote.ask(replace(opening, span=[2, 9]), wire.Opened, timeout=20)
        assert torch.equal(run(inputs), expected)
        assert run.stats.reconnects == 0
        host.remote.close()


@pytest.mark.parametrize("kind", ["step", "constants", "cancel", "close", "admit"])
def test_a_session_that_does_not_exist_is_named(host: Host, kind: str) -> None:
    session = token_bytes(16)
    messages: dict[str, wire.Message] = {
        "step": wire.Step(wire.next_id(), session, 1, 0, 0, "", {}, {}, [], [], 1000),
        "constants": wire.Constants(wire.next_id(), session, []),
        "cancel": wire.Cancel(wire.next_id(), session, 1),
        "close": wire.Close(wire.next_id(), session),
        "admit": wire.Admit(wire.next_id(), session, "k"),
    }
    with pytest.raises(SessionUnknown):
        host.ask(messages[kind])


def test_a_worker_that_was_asked_for_a_step_without_its_constants_asks_for_them(host: Host) -> None:
    host.open()
    named = dict.fromkeys(host.checkpoint.spec.constants, "0" * 64)
    step = wire.Step(wire.next_id(), host.remote.session, 1, 0, 0, "", named, {}, [], [], 1000)
    with pytest.raises(ConstantsMissing, match="img_ids, txt_ids"):
        host.ask(step, wire.Result)


def test_a_step_that_names_no_hash_for_a_constant_is_refused(host: Host) -> None:
    host.open()
    step = wire.Step(wire.next_id(), host.remote.session, 1, 0, 0, "", {"img_ids": "0" * 64}, {}, [], [], 1000)
    with pytest.raises(WireMalformed, match="txt_ids"):
        host.ask(step, wire.Result)


@pytest.fixture
def ours(path: Path, plugins: Plugins) -> Iterator[tuple[ThreadWorker, Host]]:
    """A worker with keys, and this user's open session on it."""
    with thread_workers(path.parent, 1, "mesh", plugins=plugins) as (worker,):
        host = Host(worker, plugins, path)
        host.open()
        yield worker, host
        host.remote.close()


@contextmanager
def visitor(worker: ThreadWorker, plugins: Plugins, path: Path, home: Path) -> Iterator[Host]:
    """A host of another user, whose key the worker's user authorised."""
    store, server_key = KeyStore(), KeyStore().identity().server.public
    with mesh_home(home):
        store.authorise(KeyStore().identity().client.public, home.name)
        host = Host(worker, plugins, path, server_key)
    yield host
    host.remote.close()
    store.revoke(home.name)


@pytest.mark.parametrize("what", ["step", "constants", "cancel", "close", "admit", "ping", "adjust"])
def test_another_users_session_cannot_be_used_or_closed(
    ours: tuple[ThreadWorker, Host], plugins: Plugins, path: Path, tmp_path: Path, what: str
) -> None:
    worker, host = ours
    session = host.remote.session
    messages: dict[str, wire.Message] = {
        "step": wire.Step(wire.next_id(), session, 1, 0, 0, "", {}, {}, [], [], 1000),
        "constants": wire.Constants(wire.next_id(), session, []),
        "cancel": wire.Cancel(wire.next_id(), session, 1),
        "close": wire.Close(wire.next_id(), session),
        "admit": wire.Admit(wire.next_id(), session, KeyStore().identity().client.public),
        "ping": wire.Ping(wire.next_id(), session),
        "adjust": wire.Adjust(wire.next_id(), session, []),
    }
    with visitor(worker, plugins, path, tmp_path / "visitor") as other:
        with pytest.raises(SessionUnknown):
            other.ask(messages[what], wire.Pong)
        with pytest.raises(SessionUnknown):
            other.open("2:5", session)
        assert other.open()["bytes_read"] == 0, "the weights are shared all the same"
    assert isinstance(host.ask(wire.Ping(wire.next_id(), session), wire.Pong), wire.Pong)


def test_a_neighbour_may_send_steps_for_its_session_and_nothing_else(
    ours: tuple[ThreadWorker, Host], plugins: Plugins, path: Path, tmp_path: Path
) -> None:
    worker, host = ours
    host.open("1:5", b"o" * 16)
    home, server_key = tmp_path / "neighbour", KeyStore().identity().server.public
    with mesh_home(home):
        key = KeyStore().identity().client.public
    host.ask(wire.Admit(wire.next_id(), host.remote.session, key))
    with mesh_home(home):
        neighbour = Host(worker, plugins, path, server_key)
    session = host.remote.session
    named = dict.fromkeys(host.checkpoint.spec.constants, "0" * 64)
    step = wire.Step(wire.next_id(), session, 1, 0, 0, "", named, {}, [], [{}], 1000)
    neighbour.remote.tell(step)
    with pytest.raises(ConstantsMissing, match="img_ids"):  # the answer to its step goes to the host
        await_answer([host.remote], step.id, lambda *_: None, 10, "step")
    with pytest.raises(SessionUnknown):
        neighbour.ask(replace(step, id=wire.next_id(), session=b"o" * 16), wire.Result)
    for message in (
        neighbour.opening(),
        wire.Close(wire.next_id(), session),
        wire.Catalogue(wire.next_id()),
        wire.Constants(wire.next_id(), session, []),
        wire.Admit(wire.next_id(), session, key),
        wire.Cancel(wire.next_id(), session, 1),
        wire.Adjust(wire.next_id(), session, []),
        wire.ListLoras(wire.next_id()),
        wire.Discard(wire.next_id(), "0" * 64),
        wire.Offer(wire.next_id(), "0" * 64, "0" * 64, 1, "klein", "", ""),
    ):
        with pytest.raises(NotAuthorised):
            neighbour.ask(message)
    neighbour.remote.close()


def test_who_was_never_admitted_does_not_get_in(
    ours: tuple[ThreadWorker, Host], plugins: Plugins, path: Path, tmp_path: Path
) -> None:
    server_key = KeyStore().identity().server.public
    with mesh_home(tmp_path / "stranger"), pytest.raises(NotAuthorised):
        Host(ours[0], plugins, path, server_key)


def test_a_neighbour_is_shown_out_when_the_session_ends(
    ours: tuple[ThreadWorker, Host], plugins: Plugins, path: Path, tmp_path: Path
) -> None:
    worker, host = ours
    home, server_key = tmp_path / "neighbour", KeyStore().identity().server.public
    with mesh_home(home):
        key = KeyStore().identity().client.public
    host.ask(wire.Admit(wire.next_id(), host.remote.session, key))
    host.remote.tell(wire.Close(wire.next_id(), host.remote.session))
    wait_until(lambda: len(worker.worker.sessions) == 0, what="the end of the session")
    with mesh_home(home), pytest.raises(NotAuthorised):
        Host(worker, plugins, path, server_key)


def test_a_session_that_nobody_used_for_long_is_forgotten_and_comes_back_with_its_host(
    path: Path, plugins: Plugins
) -> None:
    settings, inputs = Settings(worker=WorkerSettings(idle_after=0.3)), tiny.inputs(guidance=False)
    with (
        thread_workers(path.parent, 1, plugins=plugins, settings=settings) as (worker,),
        split(path, ":1", [worker], plugins) as run,
    ):
        expected = run(inputs)
        wait_until(lambda: len(worker.worker.sessions) == 0, what="forgetting the session")
        assert sum(worker.worker.stages.table.users().values()) == 0
        assert torch.equal(run(inputs), expected)


def test_a_span_that_does_not_fit_says_so_and_a_smaller_one_is_served(path: Path, plugins: Plugins) -> None:
    spec = checkpoint_at(path, plugins).spec
    with thread_workers(path.parent, 1, plugins=plugins, memory=span_bytes(spec, BlockSpan(2, 5), 4)) as (worker,):
        host = Host(worker, plugins, path)
        with pytest.raises(PlanDoesNotFit, match="w0"):
            host.open("1:5")
        assert host.open("2:5")["bytes_read"] == size(host, "2:5")
        host.remote.close()


def test_a_way_that_cannot_be_measured_is_closed_again(
    host: Host, worker: ThreadWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deaf(Channel):
        closed = False

        def send(self, frames: Frames) -> None:
            raise PeerLost("the next worker is gone")

        def receive(self, timeout: float) -> list[memoryview] | None: ...

        def close(self) -> None:
            self.closed = True

    deaf = Deaf()
    monkeypatch.setattr(opening, "connect_next", lambda *_: (deaf, b"n" * 16))
    following = {"address": "inproc://next", "server_key": "", "session": b"n" * 16}
    with pytest.raises(PeerLost, match="next worker is gone"):
        host.ask(replace(host.opening(), next=following, options={"measure": True}), wire.Opened)
    assert deaf.closed
    assert list(worker.worker.stages.table.users().values()) == [0]
    assert len(worker.worker.sessions) == 0


def test_requests_for_one_session_are_served_one_after_the_other(path: Path, plugins: Plugins, tmp_path: Path) -> None:
    """Two changes of LoRAs at once would leave a stage that nobody gives back, or change one that another uses."""
    with mesh_home(tmp_path), thread_workers(path.parent, 1, "mesh", plugins=plugins) as (worker,):
        store = worker.worker.stages
        first, second = Host(worker, plugins, path), Host(worker, plugins, path)
        for host in (first, second):
            host.open("0:5")
        before, overlap, inside = store.adjust, list[bool](), threading.Lock()

        def slow(*arguments: Any) -> Any:
            overlap.append(not inside.acquire(blocking=False))
            sleep(0.2)
            found = before(*arguments)
            inside.release()
            return found

        store.adjust = slow  # type: ignore[method-assign]
        for _ in range(3):
            first.remote.tell(wire.Adjust(wire.next_id(), first.remote.session, []))
        first.remote.ask(wire.Adjust(wire.next_id(), first.remote.session, []), wire.Opened, timeout=20)
        assert overlap == [False] * 4
        assert list(store.table.users().values()) == [2]
