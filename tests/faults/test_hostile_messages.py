"""Whatever arrives, a worker answers or drops it, and computes for others as before."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from mesh_core.plugins.registry import Plugins
from mesh_core.transport.base import Channel
from mesh_core.wire.failure import rebuild
from mesh_core.worker.quota import QUOTA
from tests.faults.attack import attack, drain
from tests.faults.conftest import TALKATIVE, Case
from tests.faults.honest import connected, honest_host, kinds, member, record, some_lora
from tests.faults.processes import FastWorker
from tests.support.splitting import checkpoint_at, split

_MORE_MEMORY = 200 << 20


@pytest.fixture(scope="module")
def recorded(quick: Case, steady: FastWorker, plugins: Plugins) -> list[list[bytes]]:
    return record(quick, steady.address, plugins, some_lora(checkpoint_at(quick.path, plugins)))


def test_thousands_of_hostile_messages(
    quick: Case, steady: FastWorker, plugins: Plugins, recorded: list[list[bytes]], tmp_path: Path
) -> None:
    model = checkpoint_at(quick.path, plugins)
    with member(steady.address, tmp_path) as hostile:
        report = attack(quick, steady, plugins, hostile.channel, recorded, model, messages=8_000, seed=20)
    assert report.answered > report.sent / 2, "most of it is answered, not dropped with the connection"
    assert report.grown < _MORE_MEMORY
    assert len(report.honest.exact) > 5 and all(report.honest.exact)


def test_noise_on_the_port(quick: Case, steady: FastWorker, plugins: Plugins) -> None:
    host, _, port = steady.address.removeprefix("mesh://").rpartition(":")
    noise = Random(4)
    # What a ZeroMQ peer says first, so that what follows is looked at more closely.
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
    with honest_host(quick, steady.address, plugins) as honest:
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
    assert honest.exact and all(honest.exact)


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
    with connected(steady.address, plugins) as hostile:
        for needed, done in (("open", wire.Opened), ("constants", wire.Ok)):
            hostile.channel.send(real[needed])
            while not isinstance(wire.unpack(hostile.channel.receive(20) or [])[0], done):
                pass
        drain(hostile.channel)
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

    def greedy(channel: Channel) -> None:
        for number in range(100):
            channel.send(addressed("open", number))
            channel.send(addressed("constants", number))
            sleep(0.01)
        while not enough.is_set():
            for kind in ("ping", "step", "constants"):
                channel.send(addressed(kind, Random().randrange(100)))

    def generate(_: int) -> list[bool]:
        with split(quick.path, ":1", [steady.address], plugins, settings=TALKATIVE) as runner:
            exact = [torch.equal(runner(quick.inputs), quick.expected) for _ in range(4)]
            assert runner.stats.reconnects == 0
            return exact

    before = steady.resident()
    with member(steady.address, tmp_path) as other, ThreadPoolExecutor(8) as pool:
        bad = pool.submit(greedy, other.channel)
        good = [pool.submit(generate, i) for i in range(7)]
        try:
            assert all(all(g.result(40)) for g in good)
        finally:
            enough.set()
            bad.result(30)
    assert steady.resident() - before < _MORE_MEMORY
    with connected(steady.address, plugins) as remote:
        assert remote.welcome.devices[0]["sessions"] <= 2 * QUOTA.sessions
