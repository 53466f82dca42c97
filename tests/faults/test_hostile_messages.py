"""Whatever arrives, a worker answers or drops it, and computes for others as before."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from secrets import token_bytes
from time import sleep
from typing import Any

import msgpack
import pytest
import torch

from mesh_codec.errors import CodecCorrupt
from mesh_core import wire
from mesh_core.errors import WireMalformed, WireTooLarge
from mesh_core.host.remote import Remote
from mesh_core.plugins.registry import Plugins
from mesh_core.transport.base import Address
from mesh_core.transport.invites import accept_invite, create_invite
from mesh_core.transport.keys import KeyStore
from mesh_core.transport.zeromq import ZeroMqTransport
from mesh_core.wire.failure import rebuild
from mesh_core.worker.quota import QUOTA
from tests.faults.conftest import IMPATIENT, TALKATIVE, Case
from tests.faults.mutations import Mutator
from tests.faults.processes import FastWorker
from tests.support.splitting import split
from tests.support.workers import wait_until

_MORE_MEMORY = 200 << 20


@pytest.fixture(scope="module")
def recorded(quick: Case, steady: FastWorker, plugins: Plugins) -> list[list[bytes]]:
    """All that a host sends in one generation of two steps."""
    sent: list[list[bytes]] = []
    pack = wire.pack

    def recording(message: wire.Message, *arguments: Any) -> Any:
        frames = pack(message, *arguments)
        sent.append([bytes(f) for f in frames])
        return frames

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "pack", recording)
        with split(quick.path, ":1", [steady.address], plugins, settings=IMPATIENT) as runner:
            runner(quick.inputs)
            runner(quick.inputs)
            (remote,) = runner.session.remotes if runner.session else ()
            remote.ask(wire.Ping(wire.next_id(), remote.session), wire.Pong, timeout=5)
            remote.tell(wire.Cancel(wire.next_id(), remote.session, 1))
    return sent


def kinds(recorded: list[list[bytes]]) -> dict[str, list[bytes]]:
    """The last message of each type."""
    return {msgpack.unpackb(frames[0])["t"]: frames for frames in recorded}


@contextmanager
def connected(steady: FastWorker, plugins: Plugins) -> Iterator[Remote]:
    remote = Remote(Address(steady.address), plugins, IMPATIENT)
    remote.connect()
    try:
        yield remote
    finally:
        remote.close()


@contextmanager
def undisturbed(case: Case, steady: FastWorker, plugins: Plugins) -> Iterator[list[bool]]:
    """Another session that generates meanwhile: whether each of its steps was exact."""
    exact: list[bool] = []
    enough = threading.Event()

    def generate() -> None:
        with split(case.path, ":1", [steady.address], plugins, settings=TALKATIVE) as runner:
            while not enough.is_set():
                exact.append(torch.equal(runner(case.inputs), case.expected))
            assert runner.stats.reconnects == 0 and not any(s.resent for s in runner.stats.steps)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(generate)
        wait_until(lambda: exact or running.done(), 20, "a first step")
        try:
            yield exact
        finally:
            enough.set()
            running.result(30)


def drain(remote: Remote) -> int:
    """Take what came without looking at it; how much it was."""
    count = 0
    while remote.channel.receive(0) is not None:
        count += 1
    return count


def all_is_read(remote: Remote) -> int:
    """Return once the worker has read all that was sent, and still answers; how many answers came before."""
    ping, count = wire.Ping(wire.next_id(), b""), 0
    remote.tell(ping)
    while (frames := remote.channel.receive(30)) is not None:
        message, _ = wire.unpack(frames)
        if isinstance(message, wire.Pong) and message.id == ping.id:
            return count
        count += 1
    raise AssertionError("the worker does not answer")


def test_ten_thousand_hostile_messages(
    quick: Case, steady: FastWorker, plugins: Plugins, recorded: list[list[bytes]]
) -> None:
    mutator = Mutator(recorded, seed=20)
    answers = 0
    with undisturbed(quick, steady, plugins) as exact, connected(steady, plugins) as hostile:
        opening = [kinds(recorded)[kind] for kind in ("open", "constants")]
        before, most = steady.resident(), 0
        for number in range(10_000):
            hostile.channel.send(mutator.message())
            answers += drain(hostile)
            if number % 250 == 0:
                # A mutated message may have closed the session, and only an open one looks at what comes.
                for frames in opening:
                    hostile.channel.send(frames)
                answers += all_is_read(hostile)
                most = max(most, steady.resident())
        answers += all_is_read(hostile)
        assert answers > 5000, "most of it is answered, not dropped with the connection"
        assert max(most, steady.resident()) - before < _MORE_MEMORY
    assert len(exact) > 5 and all(exact)


def test_noise_on_the_port(quick: Case, steady: FastWorker, plugins: Plugins) -> None:
    host, _, port = steady.address.removeprefix("mesh://").rpartition(":")
    noise = Random(4)
    # What a ZeroMQ peer says first, so that what follows is looked at more closely.
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
    with undisturbed(quick, steady, plugins) as exact:
        before = steady.resident()
        held = [socket.create_connection((host, int(port)), timeout=5) for _ in range(40)]
        for number in range(300):
            with socket.create_connection((host, int(port)), timeout=5) as stranger:
                start = greeting[: noise.choice((0, 10, 12, 64))] if number % 2 else b""
                try:
                    stranger.sendall(start + noise.randbytes(noise.choice((1, 64, 4096, 100_000))))
                except OSError:
                    continue
        assert steady.resident() - before < _MORE_MEMORY
        for stranger in held:
            stranger.close()
    assert exact and all(exact)


def lie(frames: list[bytes], change: Callable[[dict[str, Any]], None]) -> list[bytes]:
    header = msgpack.unpackb(frames[0])
    change(header)
    return [msgpack.packb(header), *frames[1:]]


LIES: dict[str, tuple[str, Callable[[dict[str, Any]], Any], type[Exception]]] = {
    "larger than the buffer": ("step", lambda m: m["tensors"][0]["h"].update(shape=[1, 9999, 64]), WireMalformed),
    "terabytes": ("step", lambda m: m["tensors"][0]["h"].update(shape=[1 << 20, 1 << 20]), CodecCorrupt),
    "negative size": ("step", lambda m: m["tensors"][0]["h"].update(shape=[-1, 64]), CodecCorrupt),
    "a size that is no number": ("step", lambda m: m["tensors"][0]["h"].update(shape=["1"]), CodecCorrupt),
    "nine dimensions": ("step", lambda m: m["tensors"][0]["h"].update(shape=[1] * 9), CodecCorrupt),
    "no such type": ("step", lambda m: m["tensors"][0]["h"].update(dtype="float31"), CodecCorrupt),
    "another type": ("step", lambda m: m["tensors"][0]["h"].update(dtype="float64"), WireMalformed),
    "no shape": ("step", lambda m: m["tensors"][0]["h"].pop("shape"), CodecCorrupt),
    "a buffer too many": ("step", lambda m: m["tensors"][0].update(k=2), WireMalformed),
    "another codec": ("step", lambda m: m["tensors"][0].update(c="entropy"), WireMalformed),
    "a tensor twice": ("step", lambda m: m["tensors"][1].update(n=m["tensors"][0]["n"]), WireMalformed),
    "an unknown tensor": ("step", lambda m: m["tensors"][0].update(n="secret"), WireMalformed),
    "a constant unnamed": ("step", lambda m: m["constants"].popitem(), WireMalformed),
    "buffers announced": ("step", lambda m: m.update(b=[1 << 40]), WireMalformed),
    "nesting": ("step", lambda m: m["options"].update(deep=[[[[[[[[[[[[]]]]]]]]]]]]), WireMalformed),
    "too many options": ("step", lambda m: m["options"].update({str(i): 0 for i in range(5000)}), WireTooLarge),
    "a hash of something else": ("constants", lambda m: m["tensors"][0].update(hash="0" * 64), WireMalformed),
    "constant larger": ("constants", lambda m: m["tensors"][0]["h"].update(shape=[1 << 25]), CodecCorrupt),
    "constant of complex": ("constants", lambda m: m["tensors"][0]["h"].update(dtype="complex64"), WireMalformed),
    "three numbers as span": ("open", lambda m: m.update(span=[0, 1, 2]), WireMalformed),
    "a short session": ("open", lambda m: m.update(session=b"s"), WireMalformed),
    "an unknown field": ("open", lambda m: m.update(root="/"), WireMalformed),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_refused_by_name(
    quick: Case, steady: FastWorker, plugins: Plugins, recorded: list[list[bytes]], name: str
) -> None:
    kind, change, error = LIES[name]
    session = token_bytes(16)
    real = {key: lie(frames, lambda m: m.update(session=session)) for key, frames in kinds(recorded).items()}
    with connected(steady, plugins) as hostile:
        for needed, done in (("open", wire.Opened), ("constants", wire.Ok)):
            hostile.channel.send(real[needed])
            while not isinstance(wire.unpack(hostile.channel.receive(20) or [])[0], done):
                pass
        drain(hostile)
        hostile.channel.send(lie(real[kind], change))
        while (frames := hostile.channel.receive(10)) is not None:
            answer, _ = wire.unpack(frames)
            if isinstance(answer, wire.Failed):
                assert type(rebuild(answer)) is error, answer
                assert not answer.traceback
                break
        else:
            raise AssertionError("the lie was not answered")
        hostile.channel.send(real["step"])
        while (frames := hostile.channel.receive(10)) is not None:
            if isinstance(wire.unpack(frames)[0], wire.Result):
                return
        raise AssertionError("the session does not go on")


def test_eight_hosts_of_which_one_takes_all_it_can(
    quick: Case, steady: FastWorker, plugins: Plugins, recorded: list[list[bytes]], tmp_path: Path
) -> None:
    """It opens a hundred sessions, floods the worker with steps and pings, and reads no answer."""
    real = kinds(recorded)
    enough = threading.Event()

    def addressed(kind: str, number: int) -> list[bytes]:
        return lie(real[kind], lambda m: m.update(session=number.to_bytes(16, "big")))

    def greedy() -> None:
        # Another user: what one user's programs take, they take from each other.
        keys = KeyStore(tmp_path)
        accept_invite(str(create_invite(steady.address)), keys=keys)
        transport = ZeroMqTransport(keys)
        channel = transport.connect(Address(steady.address, KeyStore().identity().server.public), 5)
        try:
            for number in range(100):
                channel.send(addressed("open", number))
                channel.send(addressed("constants", number))
                sleep(0.01)
            while not enough.is_set():
                for kind in ("ping", "step", "constants"):
                    channel.send(addressed(kind, Random().randrange(100)))
        finally:
            channel.close()
            transport.close()

    def generate(_: int) -> list[bool]:
        with split(quick.path, ":1", [steady.address], plugins, settings=TALKATIVE) as runner:
            exact = [torch.equal(runner(quick.inputs), quick.expected) for _ in range(4)]
            assert runner.stats.reconnects == 0
            return exact

    before = steady.resident()
    with ThreadPoolExecutor(8) as pool:
        bad = pool.submit(greedy)
        good = [pool.submit(generate, i) for i in range(7)]
        try:
            assert all(all(g.result(40)) for g in good)
        finally:
            enough.set()
            bad.result(30)
    assert steady.resident() - before < _MORE_MEMORY
    with connected(steady, plugins) as remote:
        assert remote.welcome.devices[0]["sessions"] <= 2 * QUOTA.sessions
