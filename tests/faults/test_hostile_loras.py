"""A member that sends LoRAs made to be slow. Beside it, pings are answered, LoRAs arrive and steps are exact."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from time import monotonic

import pytest
import torch
from blake3 import blake3

from mesh_core import wire
from mesh_core.host.remote import Remote
from mesh_core.loras.lora import Applied, Lora
from mesh_core.loras.part import Part
from mesh_core.loras.patch import Patch, Rows
from mesh_core.loras.read import lora_of_state
from mesh_core.loras.tensors import HeldTensor
from mesh_core.model import fingerprint
from mesh_core.model.library import Checkpoint
from mesh_core.plugins.registry import Plugins
from mesh_core.transport.base import Address, Channel
from mesh_core.transport.invites import accept_invite, create_invite
from mesh_core.transport.keys import KeyStore
from mesh_core.transport.zeromq import ZeroMqTransport
from tests.faults.conftest import TALKATIVE, Case
from tests.faults.processes import FastWorker
from tests.support import loras
from tests.support.hostile_loras import MB, file_of, names, rewritten
from tests.support.splitting import checkpoint_at, split

_ANSWERS_WITHIN = 1.0
"""Seconds that docs/explanation/security-model.md promises for a ping."""


@pytest.fixture(scope="module")
def checkpoint(quick: Case, plugins: Plugins) -> Checkpoint:
    return checkpoint_at(quick.path, plugins)


def honest(model: Checkpoint, seed: int) -> Lora:
    shapes = {n.removesuffix(".weight"): p.shape for n, p in model.spec.parameters.items() if len(p.shape) == 2}
    return lora_of_state(loras.peft(shapes, seed=seed), model, f"honest {seed}", {})


def contents(model: Checkpoint) -> Iterator[tuple[str, bytes, int]]:
    """Hash, file and what is announced of its size, for ever: what is refused, and the most work that is accepted."""
    one = honest(model, 0)
    width = model.spec.parameters["x_embedder.weight"].shape
    rows = (Rows("x_embedder.weight", 0, width[0]),)
    slow = [
        file_of(names(300_000, "1")),
        file_of(b'{"a":[' + b"[]," * MB + b"[]]}"),
        file_of(names(24_000, '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}')),
        rewritten(one, lambda patches, head: patches.extend([patches[0]] * 8000)),
    ]
    for number in count():
        value = HeldTensor(torch.full(tuple(width), float(number)))
        heavy = Lora.of("heavy", model.spec, [Patch("diff", rows, {"diff": value})] * 32)
        yield heavy.id, Part(heavy).read(0, Part(heavy).nbytes), Part(heavy).nbytes
        for content in slow:
            yield f"{number:064x}", content, len(content)
        yield f"{number:064x}", struct.pack("<Q", 99_000_000) + bytes(1000), 100 * MB


def member_of(worker: FastWorker, home: Path) -> tuple[ZeroMqTransport, Channel]:
    """Another user than the one who runs the worker."""
    keys = KeyStore(home)
    accept_invite(str(create_invite(worker.address)), keys=keys)
    transport = ZeroMqTransport(keys)
    return transport, transport.connect(Address(worker.address, KeyStore().identity().server.public), 5)


def test_a_member_whose_loras_are_made_to_be_slow(
    quick: Case, steady: FastWorker, plugins: Plugins, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    enough, refused = threading.Event(), []
    structure = fingerprint.structure(checkpoint.spec)

    def hostile() -> int:
        transport, channel = member_of(steady, tmp_path)
        sent, files = 0, contents(checkpoint)
        try:
            for lora, content, size in files:
                offer = wire.Offer(
                    wire.next_id(), lora, blake3(content).hexdigest(), size, checkpoint.spec.family, structure, "slow"
                )
                channel.send(wire.pack(offer))
                channel.send(wire.pack(wire.Chunk(wire.next_id(), lora, 0), [content]))
                sent += 1
                for _ in range(2):
                    frames = channel.receive(30)
                    assert frames is not None, "what is slow is answered too"
                    answer = wire.unpack(frames)[0]
                    refused.extend([answer.error] if isinstance(answer, wire.Failed) else [])
                if enough.is_set():
                    return sent
            return sent
        finally:
            channel.close()
            transport.close()

    def pings() -> float:
        slowest = 0.0
        remote = Remote(Address(steady.address), plugins, TALKATIVE)
        remote.connect()
        try:
            while not enough.is_set():
                began = monotonic()
                remote.ask(wire.Ping(wire.next_id(), b""), wire.Pong, timeout=30)
                slowest = max(slowest, monotonic() - began)
            return slowest
        finally:
            remote.close()

    with ThreadPoolExecutor(2) as pool:
        with split(quick.path, ":1", [steady.address], plugins, settings=TALKATIVE) as runner:
            bad, heard = pool.submit(hostile), pool.submit(pings)
            try:
                for seed in range(1, 4):
                    lora = honest(checkpoint, seed)
                    runner.set_loras([Applied(lora, 0.5)])
                    assert [p["action"] for p in runner.stats.loras] == ["send"]
                    changed = runner(quick.inputs)
                    assert not torch.equal(changed, quick.expected)
                    runner.set_loras([])
                    assert torch.equal(runner(quick.inputs), quick.expected)
                    runner.set_loras([Applied(lora, 0.5)])
                    assert torch.equal(runner(quick.inputs), changed)
            finally:
                enough.set()
        files, slowest = bad.result(60), heard.result(30)
        assert files >= 6 and slowest < _ANSWERS_WITHIN, (files, slowest)
    assert set(refused) <= {"LoraError", "CheckpointUnrecognised", "CheckpointCorrupt", "LoraTooLarge"}
