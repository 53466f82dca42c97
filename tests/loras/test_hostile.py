"""LoRAs that ask for far more work, memory or room than they are large: refused at once, and an honest host beside
them notices nothing."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

from mesh_core import wire
from mesh_core.errors import CheckpointError, CheckpointUnrecognised, LoraError, LoraTooLarge, WireTooLarge
from mesh_core.loras import bounds
from mesh_core.loras.apply import PatchedModel
from mesh_core.loras.library import LoraLibrary
from mesh_core.loras.lora import Applied, Lora
from mesh_core.loras.part import Part, read_part
from mesh_core.loras.patch import Patch, Rows
from mesh_core.loras.read import lora_of_state, read_lora
from mesh_core.loras.received import ReceivedLoras
from mesh_core.loras.tensors import HeldTensor
from mesh_core.model import fingerprint
from mesh_core.model.library import Checkpoint
from mesh_core.model.safetensors import parse_header
from mesh_core.transport.base import Peer
from mesh_core.worker import lora_drafts
from mesh_core.worker.requests import RequestThreads
from tests.support import loras
from tests.support.hostile_loras import MB, file_of, names, rewritten
from tests.support.inbox import Inbox, finished
from tests.support.workers import mesh_home


@pytest.fixture
def inbox(tmp_path: Path, model: Checkpoint) -> Iterator[Inbox]:
    with mesh_home(tmp_path / "home"):
        inbox = Inbox.at(tmp_path / "library", model)
        inbox.library.received.limit = 64 * MB
        yield inbox


def small(model: Checkpoint, seed: int = 0) -> Lora:
    shapes = {"x_embedder": model.spec.parameters["x_embedder.weight"].shape}
    return lora_of_state(loras.peft(shapes, seed=seed), model, f"honest {seed}", {})


def sent(inbox: Inbox, content: bytes, owner: str = "hostile") -> int:
    """What a host is told that offers ``content`` under a hash that it made up, and sends all of it."""
    offer = wire.Offer(
        1, "ab" * 32, blake3(content).hexdigest(), len(content), "klein", fingerprint.structure(inbox.model.spec), "x"
    )
    have = finished(inbox.receiver.offer(owner, offer))
    piece = wire.Chunk(2, offer.lora, have)
    return finished(inbox.receiver.chunk(owner, piece, memoryview(content)[have:]))


@pytest.mark.parametrize(
    "head",
    [
        names(300_000, "1"),
        names(75_000, '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'),
        b'{"a":' + b"[" * MB,
        b'{"a":[' + b"[]," * MB + b"[]]}",
        b'{"a":' + b"9" * MB + b"}",
        b'{"a":{"dtype":"F32","shape":[' + b"9," * MB + b'9],"data_offsets":[0,0]}}',
        b'{"__metadata__":' + names(300_000, '""') + b"}",
        b'{"__metadata__":{"a":{"b":"c"}}}',
        b"[1,2]",
        b'{"a":1} x',
        b'\xff{"a":1}',
    ],
    ids=[
        "names", "tensors", "depth", "lists", "digits", "dimensions", "metadata", "metadata that is none", "no object",
        "something after it", "no text",
    ],
)  # fmt: skip
def test_a_head_that_would_be_slow_to_read_is_refused(inbox: Inbox, head: bytes) -> None:
    with pytest.raises(CheckpointError):
        parse_header(head, "x")
    with pytest.raises((CheckpointError, LoraError), match="header"):
        sent(inbox, file_of(head))
    assert inbox.drafts() == [] and inbox.kept() == []
    honest = small(inbox.model)
    inbox.send(honest)
    assert inbox.kept() == [honest.id]


@pytest.mark.parametrize("space", ["", " ", "  ", "\t", "\n"])
@pytest.mark.parametrize("name", ["a{}", "a{}\\\\", "a{}\\\\\\\\", 'a{}\\"'])
def test_no_way_of_writing_names_hides_how_many_there_are(name: str, space: str) -> None:
    head = "{" + ",".join(f'"{name.format(i)}"{space}:1' for i in range(200_000)) + "}"
    if name != 'a{}\\"' or space:
        with pytest.raises(CheckpointUnrecognised, match="more names"):
            parse_header(head.encode(), "x")
    else:
        # As it looks in the lists of tags inside of metadata; what has no right value is refused at the first one.
        with pytest.raises(CheckpointError):
            parse_header(head.encode(), "x")


def test_a_head_over_the_limit_is_refused_with_its_first_bytes(inbox: Inbox) -> None:
    inbox.library.received.limit = 400 * MB
    structure = fingerprint.structure(inbox.model.spec)
    offer = wire.Offer(1, "cd" * 32, "0" * 64, 100 * MB, "klein", structure, "x")
    finished(inbox.receiver.offer("hostile", offer))
    start = struct.pack("<Q", 99_000_000) + b"{"
    with pytest.raises(CheckpointUnrecognised, match=r"header of 99\.0 MB; at most 4\.2 MB"):
        finished(inbox.receiver.chunk("hostile", wire.Chunk(2, offer.lora, 0), memoryview(start)))
    assert inbox.drafts() == []


def test_a_users_own_file_with_much_metadata_is_read_and_one_with_far_too_much_is_named(
    tmp_path: Path, model: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    state = loras.peft({"x_embedder": model.spec.parameters["x_embedder.weight"].shape})
    tags = json.dumps({"1_x": {f"tag number {i}": i for i in range(50_000)}})
    good = loras.save(tmp_path / "own" / "tags.safetensors", state, ss_tag_frequency=tags, ss_comment="x" * 4 * MB)
    large = loras.save(tmp_path / "own" / "large.safetensors", state, ss_comment="x" * 17 * MB)
    assert read_lora(good, model).id == lora_of_state(state, model, "x", {}).id
    with pytest.raises(
        CheckpointUnrecognised, match=r"large\.safetensors has a header of 17\.\d MB; at most"
    ) as caught:
        read_lora(large, model)
    assert "metadata" in caught.value.hint
    (listed,) = LoraLibrary(ReceivedLoras(tmp_path / "none", 0), [tmp_path / "own"]).listing()
    assert listed["name"] == "tags.safetensors" and listed["trigger"].startswith("tag number 49999, tag number 49998")
    assert "large.safetensors" in caplog.text


def many_of_one_tensor(patches: list[Any], head: dict[str, Any]) -> None:
    patches += [patches[0]] * 5000


def many_patches(patches: list[Any], head: dict[str, Any]) -> None:
    patches += [["diff", [["x_embedder.weight", 0, 1]], None, None, {}]] * 50_000


def more_metadata(patches: list[Any], head: dict[str, Any]) -> None:
    head["__metadata__"]["ss_tag_frequency"] = "{}"


def a_tensor_of_no_patch(patches: list[Any], head: dict[str, Any]) -> None:
    head[str(len(head) - 1)] = {"dtype": "F32", "shape": [0], "data_offsets": [head["1"]["data_offsets"][1]] * 2}


def flags_for_numbers(patches: list[Any], head: dict[str, Any]) -> None:
    patches[0][1][0][1] = False


@pytest.mark.parametrize(
    "change", [many_of_one_tensor, many_patches, more_metadata, a_tensor_of_no_patch, flags_for_numbers]
)
def test_a_file_whose_patches_are_not_each_of_tensors_of_their_own(
    inbox: Inbox, change: Callable[[list[Any], dict[str, Any]], None], tmp_path: Path
) -> None:
    content = rewritten(small(inbox.model), change)
    with pytest.raises(LoraError, match="no LoRA in the mesh's form"):
        sent(inbox, content)
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(LoraError, match="no LoRA in the mesh's form"):
        read_part(tmp_path / "x.safetensors", inbox.model.spec)
    assert inbox.drafts() == [] and inbox.kept() == []


def diff(model: Checkpoint, *names: str) -> Patch:
    """Nothing is added to the whole of these weights, joined."""
    rows = [Rows(n, 0, model.spec.parameters[n].shape[0]) for n in names]
    shape = (sum(map(len, rows)), *model.spec.parameters[names[0]].shape[1:])
    return Patch("diff", tuple(rows), {"diff": HeldTensor(torch.zeros(shape))})


def test_patches_of_one_weight_are_counted(model: Checkpoint) -> None:
    one = diff(model, "x_embedder.weight")
    assert len(Lora.of("x", model.spec, [one] * bounds.MOST_PATCHES_OF_A_WEIGHT).patches) > 10
    with pytest.raises(LoraError, match=r"33 patches of x_embedder\.weight"):
        Lora.of("x", model.spec, [one] * (bounds.MOST_PATCHES_OF_A_WEIGHT + 1))


def test_many_loras_on_one_weight(model: Checkpoint) -> None:
    """More than anybody stacks can be used at once; merging as many as a message can name is refused before it."""
    module = torch.nn.Module()
    module.x_embedder = torch.nn.Linear(*reversed(model.spec.parameters["x_embedder.weight"].shape), bias=False)
    before = module.x_embedder.weight.detach().clone()
    patched = PatchedModel(module, ["x_embedder.weight"])
    rows = diff(model, "x_embedder.weight").target
    one = Lora.of("x", model.spec, [Patch("diff", rows, {"diff": HeldTensor(torch.ones_like(before))})])
    patched.apply([Applied(one, 1.0)] * 40)
    torch.testing.assert_close(module.x_embedder.weight.data, before + 40)
    with pytest.raises(LoraError, match=r"513 patches of x_embedder\.weight at once"):
        patched.apply([Applied(one)] * 513)
    torch.testing.assert_close(module.x_embedder.weight.data, before + 40)


def test_weights_that_would_all_have_to_be_in_memory_at_once(model: Checkpoint) -> None:
    """Each patch joins two; together they would join all."""
    width = model.spec.parameters["transformer_blocks.0.attn.to_q.weight"].shape[1:]
    alike = [n for n, p in model.spec.parameters.items() if p.shape[1:] == width]
    chain = Lora.of("x", model.spec, [diff(model, *pair) for pair in pairwise(alike)])
    long = diff(model, *[alike[i % 2] for i in range(bounds.MOST_ROWS + 1)])
    with pytest.raises(LoraError, match="joins more than 16"):
        Lora.of("x", model.spec, [long])
    assert len(alike) > bounds.MOST_ROWS
    with pytest.raises(LoraError, match="join 17 weights"):
        PatchedModel(torch.nn.Module(), alike).apply([Applied(chain)])


def test_a_rank_far_beyond_the_width_of_a_weight(inbox: Inbox) -> None:
    out, width = inbox.model.spec.parameters["x_embedder.weight"].shape
    rows = (Rows("x_embedder.weight", 0, out),)

    def of_rank(rank: int) -> Lora:
        pair = {"up": HeldTensor(torch.zeros(out, rank)), "down": HeldTensor(torch.zeros(rank, width))}
        return Lora.of("x", inbox.model.spec, [Patch("lora", rows, pair)])

    assert of_rank(1024).patches, "wider than the weight, as trainers write them for small ones"
    with pytest.raises(LoraError, match="larger than any rank"):
        of_rank(1025)


def on_disk(inbox: Inbox) -> int:
    return sum(p.stat().st_size for p in inbox.library.received.folder.rglob("*") if p.suffix != ".json")


def offer_of(inbox: Inbox, number: int, size: int, owner: str) -> str:
    structure = fingerprint.structure(inbox.model.spec)
    lora = f"{number:064x}"
    finished(inbox.receiver.offer(owner, wire.Offer(1, lora, "0" * 64, size, "klein", structure, "x")))
    return lora


def test_what_is_on_its_way_counts_as_announced_and_leaves_room_for_others(inbox: Inbox) -> None:
    kept = [small(inbox.model, seed) for seed in range(3)]
    for lora in kept:
        inbox.send(lora)
    size = Part(kept[0]).nbytes
    limit = inbox.library.received.limit = 20 * size
    with pytest.raises(LoraTooLarge, match="one host may send"):
        offer_of(inbox, 0, limit // 2 + 1, "hostile")
    offered = [offer_of(inbox, i, limit // 4 - 8, "hostile") for i in range(2)]
    with pytest.raises(WireTooLarge, match="2 LoRAs of one host"):
        offer_of(inbox, 9, size, "hostile")
    assert inbox.kept() == sorted(x.id for x in kept), "an offer alone removes nothing"
    for lora in offered:
        data = memoryview(struct.pack("<Q", limit // 4 - 90) + bytes(limit // 4 - 100))
        assert finished(inbox.receiver.chunk("hostile", wire.Chunk(2, lora, 0), data)) == data.nbytes
    assert on_disk(inbox) <= limit
    honest = small(inbox.model, 7)
    inbox.send(honest, "honest")
    assert honest.id in inbox.kept() and on_disk(inbox) <= limit
    offer_of(inbox, 20, limit // 2 - size, "honest")
    with pytest.raises(LoraTooLarge, match="in use or on their way"):
        offer_of(inbox, 21, 3 * size, "third")


def test_what_nobody_goes_on_with_gives_way(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    lora, size = small(inbox.model), Part(small(inbox.model)).nbytes
    inbox.library.received.limit = 10 * size
    for number in range(4):
        offer_of(inbox, number, size, "host")
    with pytest.raises(WireTooLarge, match="4 LoRAs of one host"):
        inbox.send(lora)
    monkeypatch.setattr(lora_drafts, "_SILENT", 0.0)
    inbox.send(lora)
    assert inbox.kept() == [lora.id]
    for number in range(100):
        made = offer_of(inbox, 100 + number, size, f"host {number}")
        finished(inbox.receiver.chunk(f"host {number}", wire.Chunk(2, made, 0), memoryview(b"x")))
    assert len(inbox.drafts()) <= 64 + 10, "of what broke off, not every file is kept"
    assert on_disk(inbox) <= inbox.library.received.limit


class _Said:
    """Replies that nobody reads."""

    def fail(self, route: bytes, message: wire.Message | None, error: BaseException) -> None:
        raise AssertionError(error)


def test_an_honest_host_has_its_turn_between_the_pieces_of_another_ones_lora() -> None:
    """100 000 pieces of one host's request are not waited for, nor 15 more requests; one host's own stay in order."""
    requests, done = RequestThreads(_Said()), []  # type: ignore[arg-type]
    first, ended = threading.Event(), threading.Event()

    def long(name: str) -> Iterator[None]:
        for _ in range(10_000):
            first.set()
            yield
        done.append(name)
        if name == "long 15":
            ended.set()

    def short(name: str) -> Iterator[None]:
        yield
        done.append(name)

    hostile, honest = (Peer(key=k, route=k.encode(), trust="member") for k in ("hostile", "honest"))
    message = wire.ListLoras(1)
    for number in range(16):
        requests.submit(requests.receiving, hostile, message, lambda name=f"long {number}": long(name))
    with pytest.raises(WireTooLarge):
        requests.submit(requests.receiving, hostile, message, lambda: long("one too many"))
    assert first.wait(30)
    for number in range(3):
        requests.submit(requests.receiving, honest, message, lambda name=f"short {number}": short(name))
    assert ended.wait(60)
    requests.stop()
    assert done[:3] == ["short 0", "short 1", "short 2"] or done.index("short 2") <= 3
    assert [d for d in done if d.startswith("long")] == [f"long {i}" for i in range(16)]
