"""LoRAs on their way to a worker: whatever goes wrong has a name, the library stays whole and the worker goes on."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mesh_core import wire
from mesh_core.builtin import load_plugins
from mesh_core.errors import CheckpointMismatch, LoraError, LoraMissing, LoraTooLarge, WireMalformed
from mesh_core.host import loras as host_loras
from mesh_core.host.progress import Activity
from mesh_core.host.remote import Remote
from mesh_core.loras.lora import Applied, Lora
from mesh_core.loras.part import Part, read_part
from mesh_core.loras.read import lora_of_state, read_lora
from mesh_core.model import fingerprint
from mesh_core.model.library import Checkpoint
from mesh_core.system.config import Loras, Settings
from mesh_core.transport.base import Address
from tests.adapters import tiny
from tests.faults.processes import FastWorker
from tests.support import loras
from tests.support.inbox import STEP, Inbox, flipped
from tests.support.splitting import split
from tests.support.workers import mesh_home, thread_workers


def make(model: Checkpoint, seed: int = 0, rank: int = 3) -> Lora:
    shapes = {"x_embedder": (model.spec.parameters["x_embedder.weight"].shape)}
    shapes |= {n.removesuffix(".weight"): p.shape for n, p in model.spec.parameters.items() if ".to_q." in n}
    return lora_of_state(loras.peft(shapes, seed=seed, rank=rank), model, f"lora {seed}", {})


@pytest.fixture
def inbox(tmp_path: Path, model: Checkpoint) -> Iterator[Inbox]:
    with mesh_home(tmp_path / "home"):
        yield Inbox.at(tmp_path / "library", model)


def test_what_arrives_is_what_was_sent(inbox: Inbox) -> None:
    lora = make(inbox.model)
    inbox.send(lora)
    assert inbox.kept() == [lora.id] and inbox.drafts() == []
    again = read_part(inbox.library.received.path_of(lora.id), inbox.model.spec)
    assert again.id == lora.id
    assert inbox.offer(lora) == Part(lora).nbytes, "it is not sent twice"


def test_any_part_of_a_file_is_the_same_bytes_as_in_the_whole(model: Checkpoint) -> None:
    part = Part(make(model))
    whole = part.read(0, part.nbytes)
    assert len(whole) == part.nbytes
    pieces = b"".join(part.read(start, 777) for start in range(0, part.nbytes, 777))
    assert pieces == whole and part.read(part.nbytes, 10) == b""


def test_a_broken_transfer_goes_on_where_it_stopped(inbox: Inbox) -> None:
    lora = make(inbox.model)
    inbox.offer(lora)
    have = inbox.chunk(lora, inbox.chunk(lora, 0))
    assert have == 2 * STEP and inbox.kept() == []
    restarted = inbox.restarted()
    assert restarted.offer(lora) == have
    restarted.send(lora)
    assert restarted.kept() == [lora.id]


def test_two_hosts_that_send_the_same_at_once(inbox: Inbox) -> None:
    lora = make(inbox.model)
    inbox.offer(lora, "one"), inbox.offer(lora, "two")
    inbox.chunk(lora, 0, owner="one"), inbox.chunk(lora, 0, owner="two")
    inbox.send(lora, "two")
    assert inbox.chunk(lora, STEP, owner="one") == Part(lora).nbytes, "the other one's is taken"
    assert inbox.kept() == [lora.id] and inbox.drafts() == []


def test_content_that_is_not_what_was_offered(inbox: Inbox) -> None:
    lora = make(inbox.model)
    inbox.offer(lora)
    have, size = 0, Part(lora).nbytes
    with pytest.raises(LoraError, match="does not have the hash"):
        while have < size:
            data = Part(lora).read(have, STEP)
            have = inbox.chunk(lora, have, flipped(data) if have + len(data) == size else data)
    assert inbox.kept() == [] and inbox.drafts() == []
    inbox.send(lora)
    assert inbox.kept() == [lora.id]


def test_a_lora_under_another_ones_hash(inbox: Inbox) -> None:
    lora, other = make(inbox.model), make(inbox.model, seed=9)
    part = Part(other)
    inbox.offer(lora, digest=part.digest(), size=part.nbytes)
    with pytest.raises(LoraError, match="not the LoRA that it was offered as"):
        for start in range(0, part.nbytes, STEP):
            inbox.chunk(lora, start, part.read(start, STEP))
    assert inbox.kept() == [] and inbox.drafts() == []


def test_values_that_are_not_finite(inbox: Inbox) -> None:
    state = loras.peft({"x_embedder": inbox.model.spec.parameters["x_embedder.weight"].shape})
    state["transformer.x_embedder.lora_A.weight"][0, 0] = float("nan")
    with pytest.raises(LoraError, match="not finite"):
        inbox.send(lora_of_state(state, inbox.model, "broken", {}))
    assert inbox.kept() == []


@pytest.mark.parametrize(
    ("offset", "size"), [(STEP, 10), (0, 0), (0, 10**5)], ids=["a gap", "nothing", "more than announced"]
)
def test_pieces_that_do_not_follow(inbox: Inbox, offset: int, size: int) -> None:
    lora = make(inbox.model)
    inbox.offer(lora)
    with pytest.raises(WireMalformed, match="does not follow"):
        inbox.chunk(lora, offset, bytes(size))
    inbox.send(lora)
    assert inbox.kept() == [lora.id]


def test_pieces_of_nothing_that_was_offered(inbox: Inbox) -> None:
    with pytest.raises(WireMalformed, match="not offered"):
        inbox.chunk(make(inbox.model), 0)


def test_a_full_disk(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    lora, kept = make(inbox.model), make(inbox.model, seed=5)
    inbox.send(kept)
    inbox.offer(lora)
    opened = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "ab":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, mode, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        with pytest.raises(LoraError, match="disk is full"):
            inbox.chunk(lora, 0)
    assert inbox.kept() == [kept.id] and inbox.drafts() == []
    inbox.send(lora)
    assert inbox.kept() == sorted([kept.id, lora.id])


def test_the_least_recently_used_make_room_and_those_in_use_stay(inbox: Inbox) -> None:
    made = [make(inbox.model, seed=i) for i in range(4)]
    size = Part(made[0]).nbytes
    inbox.library.received.limit = 2 * size + 100
    inbox.send(made[0])
    inbox.send(made[1])
    parameters = inbox.model.spec.parameters
    found = inbox.library.find(made[0].id, made[0].outline, inbox.model, parameters)
    assert found is not None, "it counts as used now"
    inbox.send(made[2])
    assert inbox.kept() == sorted([made[0].id, made[2].id])
    second = inbox.library.find(made[2].id, made[2].outline, inbox.model, parameters)
    assert second is not None
    inbox.library.received.hold([found, second])
    with pytest.raises(LoraTooLarge, match="in use"):
        inbox.send(made[3])
    with pytest.raises(LoraError, match="in use"):
        inbox.library.received.remove(made[0].id)
    inbox.library.received.let_go([found, second])
    inbox.send(made[3])
    assert made[3].id in inbox.kept()


def test_a_lora_that_is_larger_than_the_library(inbox: Inbox) -> None:
    inbox.library.received.limit = 100
    with pytest.raises(LoraTooLarge, match=r"library") as caught:
        inbox.offer(make(inbox.model))
    assert "config.toml" in caught.value.hint and inbox.drafts() == []


@pytest.mark.parametrize("id_", ["../../../etc/passwd", "a" * 63, "A" * 64, "." * 64, "/" * 64, "..\\" + "a" * 61])
def test_a_hash_that_is_none_is_no_path(inbox: Inbox, id_: str) -> None:
    with pytest.raises(LoraError, match="not the hash"):
        inbox.offer(make(inbox.model), lora=id_)
    with pytest.raises(LoraError, match="not the hash"):
        inbox.library.received.remove(id_)


def test_names_lead_nowhere(inbox: Inbox) -> None:
    lora = replace(make(inbox.model), name="../../evil\0\n<b>")
    inbox.send(lora)
    inside = {p.name for p in inbox.library.received.folder.rglob("*")}
    assert inside == {f"{lora.id}.safetensors", f"{lora.id}.json", "incoming"}
    with pytest.raises(LoraMissing):
        inbox.library.named("../library/" + lora.id, inbox.model, inbox.model.spec.parameters)


def test_a_file_that_changes_while_it_is_sent(inbox: Inbox, tmp_path: Path) -> None:
    shapes = {"x_embedder": inbox.model.spec.parameters["x_embedder.weight"].shape}
    file = loras.save(tmp_path / "moving.safetensors", loras.peft(shapes))
    lora = read_lora(file, inbox.model)
    inbox.offer(lora)
    inbox.chunk(lora, 0)
    loras.save(file, loras.peft(shapes, seed=77, rank=4))
    with pytest.raises(LoraError, match="changed while"):
        Part(lora).read(STEP, STEP)
    assert inbox.kept() == []


@pytest.fixture
def worker(model: Checkpoint, tmp_path: Path) -> Iterator[FastWorker]:
    with mesh_home(tmp_path / "home"):
        started = FastWorker(model.header.path, "w0", Settings(), 4 << 30)
        yield started
        started.kill()


def remote_of(worker: FastWorker) -> Remote:
    remote = Remote(Address(worker.address), load_plugins(), Settings())
    remote.connect()
    return remote


def test_a_worker_that_is_killed_in_the_middle_and_a_transfer_that_is_cancelled(
    worker: FastWorker, model: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_loras, "CHUNK", STEP)
    lora, size = make(model, rank=8), Part(make(model, rank=8)).nbytes
    structure = fingerprint.structure(model.spec)

    stopped: list[int] = []

    class Enough(Exception):
        pass

    def stop_at(limit: int) -> Callable[..., None]:
        def report(activity: Activity) -> None:
            assert activity.total == size and activity.words.endswith(": sending LoRA lora 0")
            if activity.done >= limit:
                stopped.append(activity.done)
                raise Enough

        return report

    remote = remote_of(worker)
    with pytest.raises(Enough):
        host_loras.send(remote, lora, structure, Settings(), stop_at(5 * STEP))
    remote.close()
    worker.restart()
    remote = remote_of(worker)
    sent = host_loras.send(remote, lora, structure, Settings(), None)
    assert sent == size - stopped[0] < size - 4 * STEP
    assert host_loras.send(remote, lora, structure, Settings(), None) == 0
    listed = remote.ask(wire.ListLoras(wire.next_id()), wire.LorasListed, timeout=20).loras
    assert [x["id"] for x in listed] == [lora.id]
    with pytest.raises(CheckpointMismatch):
        host_loras.send(remote, make(model, seed=3), "0" * 64, Settings(), None)
    remote.close()


def test_steps_of_another_session_go_on_during_a_transfer(model: Checkpoint, tmp_path: Path) -> None:
    """How fast they go on is measured in benchmarks/lora.py."""
    plugins = load_plugins()
    inputs = tiny.inputs(guidance=False)
    with mesh_home(tmp_path / "home"), thread_workers(model.header.path, 1, "mesh", plugins=plugins) as (w0,):
        with split(model.header.path, ":1", [w0], plugins) as run:
            expected = run(inputs)
            remote, steps = remote_of(w0), []  # type: ignore[arg-type]
            middle, done = threading.Event(), threading.Event()

            def report(activity: Activity) -> None:
                if activity.done == 0:
                    middle.set()
                    assert done.wait(30)

            sender = threading.Thread(
                target=host_loras.send,
                args=(remote, make(model), fingerprint.structure(model.spec), Settings(), report),
            )
            sender.start()
            assert middle.wait(30)
            steps = [torch.equal(run(inputs), expected) for _ in range(3)]
            done.set()
            sender.join(30)
            assert steps == [True] * 3 and not sender.is_alive()
            remote.close()


def test_what_is_large_is_refused_with_the_two_ways_out_and_sent_when_asked(model: Checkpoint, tmp_path: Path) -> None:
    plugins, lora = load_plugins(), make(model)
    settings = Settings(loras=Loras(largest_sent=100))
    with mesh_home(tmp_path / "home"), thread_workers(model.header.path, 1, plugins=plugins) as (w0,):
        with split(model.header.path, ":0", [w0], plugins, settings=settings) as run:
            with pytest.raises(LoraTooLarge, match="more than the 0 MB") as caught:
                run.set_loras([Applied(lora)])
            assert "--loras" in caught.value.hint and "largest_sent" in caught.value.hint
            assert w0.worker.loras.lora_library.listing() == []
            run.set_loras([Applied(lora, send=True)])
            assert [p["action"] for p in run.stats.loras] == ["send"]
            run.set_loras([Applied(lora, 0.5)])
            assert [p["action"] for p in run.stats.loras] == ["reference"]
            assert str(run.stats.table()) and run.stats.loras[0]["reason"].endswith("has it")


def test_a_part_holds_the_tensors_of_its_span_alone(model: Checkpoint, tmp_path: Path) -> None:
    lora = make(model)
    span = model.spec.span("1:2")
    part = lora.restricted(model.spec.parameters_of(span))
    path = tmp_path / "part.safetensors"
    path.write_bytes(Part(part).read(0, 10**7))
    assert len(load_file(path)) == 2 and len(lora.patches) > 2
