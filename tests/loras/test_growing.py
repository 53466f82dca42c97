"""A worker that has a part of a LoRA and needs a larger one is sent what it lacks, whatever the file's head says."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

from mesh_core.builtin import load_plugins
from mesh_core.errors import LoraError
from mesh_core.host import loras as host_loras
from mesh_core.loras.lora import Applied, Lora
from mesh_core.loras.part import Part, read_part
from mesh_core.loras.read import lora_of_state
from mesh_core.loras.stored import TensorFile
from mesh_core.model.checkpoint import read_header
from mesh_core.model.library import Checkpoint
from mesh_core.system.file_stamp import FileStamp
from mesh_core.system.remembered import Remembered
from tests.adapters import tiny
from tests.support import loras
from tests.support.inbox import STEP, Inbox, flipped
from tests.support.splitting import split
from tests.support.workers import mesh_home, thread_workers

PIECE = 64
"""Bytes of a piece in these tests: what may cross in vain where one begins that is there."""


@pytest.fixture
def inbox(tmp_path: Path, model: Checkpoint) -> Iterator[Inbox]:
    with mesh_home(tmp_path / "home"):
        yield Inbox.at(tmp_path / "library", model)


def make(model: Checkpoint) -> Lora:
    """Of every linear layer of every block."""
    shapes = {n.removesuffix(".weight"): p.shape for n, p in model.spec.parameters.items() if len(p.shape) == 2}
    return lora_of_state(loras.peft(shapes), model, "ink", {})


def blocks(lora: Lora, model: Checkpoint, span: str) -> Lora:
    return lora.restricted(model.spec.parameters_of(model.spec.span(span)))


def tensors(lora: Lora) -> dict[str, int]:
    """Bytes of what a LoRA holds, by hash."""
    return {t.digest(): t.nbytes for p in lora.patches for t in p.tensors.values()}


@dataclass
class Counted:
    """What crossed, without the head of the file that says what it holds."""

    inbox: Inbox
    nbytes: int = 0

    def send(self, lora: Lora) -> None:
        part = Part(lora)
        have = self.inbox.offer(lora)
        while have < part.nbytes:
            in_head = have < part.head_nbytes
            data = part.read(have, part.head_nbytes - have if in_head else PIECE)
            self.nbytes += 0 if in_head else len(data)
            have = self.inbox.chunk(lora, have, data)


def test_a_part_that_grows_is_sent_what_it_lacks(inbox: Inbox) -> None:
    lora = make(inbox.model)
    small, large = blocks(lora, inbox.model, "2:4"), blocks(lora, inbox.model, ":5")
    counted = Counted(inbox)
    counted.send(small)
    assert counted.nbytes == sum(tensors(small).values())
    counted.nbytes = 0
    counted.send(large)
    lacking = sum(n for digest, n in tensors(large).items() if digest not in tensors(small))
    assert 0 < lacking <= counted.nbytes < lacking + 4 * PIECE < sum(tensors(large).values())
    assert inbox.kept() == sorted([small.id, large.id])
    assert read_part(inbox.library.received.path_of(large.id), inbox.model.spec).id == large.id
    counted.nbytes = 0
    counted.send(blocks(lora, inbox.model, "1:3"))
    assert counted.nbytes == 0, "all of it is in the larger one"


def test_a_broken_transfer_of_a_part_that_grows(inbox: Inbox) -> None:
    lora = make(inbox.model)
    small, large = blocks(lora, inbox.model, "2:4"), blocks(lora, inbox.model, ":5")
    inbox.send(small)
    inbox.offer(large)
    inbox.chunk(large, 0, Part(large).read(0, Part(large).head_nbytes + 10))
    again = inbox.restarted()
    counted = Counted(again)
    counted.send(large)
    lacking = sum(n for digest, n in tensors(large).items() if digest not in tensors(small))
    assert counted.nbytes < lacking + 4 * PIECE and again.kept() == sorted([small.id, large.id])


def test_a_damaged_part_gives_nothing_to_a_larger_one(inbox: Inbox, caplog: pytest.LogCaptureFixture) -> None:
    lora = make(inbox.model)
    small, large = blocks(lora, inbox.model, "2:4"), blocks(lora, inbox.model, ":5")
    inbox.send(small)
    path = inbox.library.received.path_of(small.id)
    digests = dict(TensorFile(read_header(path)).digests())
    path.write_bytes(flipped(path.read_bytes()))
    # A disk that rots changes no stamp.
    Remembered("loras", {path: FileStamp.at(path)}).put(digests)
    inbox.send(large)
    assert large.id in inbox.kept() and "damaged" in caplog.text


@pytest.mark.parametrize(
    "lie",
    [
        lambda hashes: hashes[::-1],
        lambda hashes: [*hashes, *hashes],
        lambda hashes: {"0": hashes},
        lambda hashes: 10**400,
        lambda hashes: [None, [], *hashes[2:]],
    ],
    ids=["the wrong way round", "too many", "a map", "a number", "no text"],
)
def test_a_head_that_lies_about_hashes_gains_nothing(inbox: Inbox, lie: Callable[[Any], Any]) -> None:
    lora = make(inbox.model)
    small, large = blocks(lora, inbox.model, "2:4"), blocks(lora, inbox.model, ":5")
    inbox.send(small)
    data = Part(large).read(0, 10**7)
    size = struct.unpack("<Q", data[:8])[0]
    head = json.loads(data[8 : 8 + size])
    head["__metadata__"]["hashes"] = json.dumps(lie(json.loads(head["__metadata__"]["hashes"])))
    text = json.dumps(head).encode()
    file = struct.pack("<Q", len(text)) + text + data[8 + size :]
    have, failed = inbox.offer(large, digest=blake3(file).hexdigest(), size=len(file)), False
    try:
        while have < len(file):
            have = inbox.chunk(large, have, file[have : have + STEP])
    except LoraError as error:
        failed = "does not have the hash" in error.message
    # What it says wrongly is copied wrongly, which the hash of the file shows; what it does not say is sent.
    assert failed or large.id in inbox.kept()
    assert inbox.drafts() == [] and small.id in inbox.kept()
    inbox.send(large)
    assert read_part(inbox.library.received.path_of(large.id), inbox.model.spec).id == large.id


@pytest.mark.parametrize("scheme", ["inproc", "mesh"])
def test_a_span_that_grows(model: Checkpoint, tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_loras, "CHUNK", PIECE)
    plugins, lora, inputs = load_plugins(), make(model), tiny.inputs(guidance=False)
    path = model.header.path
    with mesh_home(tmp_path / "home"), thread_workers(path, 1, scheme, plugins=plugins) as (worker,):
        seen = []
        for cut in (":3", ":1", ":2"):
            with split(path, cut, [worker], plugins) as run:
                run.set_loras([Applied(lora, 0.5)])
                (placed,) = run.stats.loras
                seen.append((run(inputs), placed["bytes_sent"]))
        small, large = blocks(lora, model, "3:"), blocks(lora, model, "1:")
        lacking = sum(n for digest, n in tensors(large).items() if digest not in tensors(small))
        assert [sent for _, sent in seen][::2] == [Part(small).nbytes, 0]
        assert lacking <= seen[1][1] - Part(large).head_nbytes < lacking + 8 * PIECE < sum(tensors(large).values())
        assert all(torch.equal(output, seen[0][0]) for output, _ in seen)
