"""LoRAs on a split model: whatever the cut and the way they came, the result is that of the whole model with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mesh_core import wire
from mesh_core.builtin import load_plugins
from mesh_core.errors import PlanDoesNotFit
from mesh_core.loras.apply import PatchedModel
from mesh_core.loras.lora import Applied, Lora
from mesh_core.loras.read import read_lora
from mesh_core.model.library import Checkpoint
from mesh_core.model.sizes import span_bytes
from mesh_core.plugins.registry import Plugins
from tests.adapters import tiny
from tests.support import loras
from tests.support.splitting import checkpoint_at, split
from tests.support.workers import ThreadWorker, mesh_home, thread_workers


@dataclass
class Rig:
    path: Path
    checkpoint: Checkpoint
    model: nn.Module
    plugins: Plugins
    workers: list[ThreadWorker]
    ink: Lora
    chalk: Lora
    inputs: dict[str, Any]

    def whole(self, *applied: Applied) -> Tensor:
        """The unsplit model with these LoRAs."""
        patched = PatchedModel(self.model, self.checkpoint.spec.parameters)
        patched.apply(applied)
        with torch.no_grad():
            result: Tensor = self.model(**self.inputs, return_dict=False)[0]
        patched.apply(())
        return result


@pytest.fixture(scope="module", params=["inproc", "mesh"])
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("models")
    model = tiny.transformer(guidance=False)
    model.save_pretrained(folder / "klein")
    plugins = load_plugins()
    checkpoint = checkpoint_at(folder / "klein", plugins)
    shapes = loras.modules(model)
    ink = loras.save(folder / "host" / "ink.safetensors", loras.peft(shapes))
    chalk = loras.save(folder / "host" / "chalk.safetensors", loras.peft(shapes, rank=5, seed=100))
    with mesh_home(tmp_path_factory.mktemp("home")):
        with thread_workers(folder / "klein", 2, request.param, plugins=plugins) as workers:
            yield Rig(
                folder / "klein",
                checkpoint,
                model,
                plugins,
                workers,
                read_lora(ink, checkpoint),
                read_lora(chalk, checkpoint),
                tiny.inputs(guidance=False),
            )


def sent(run: Any) -> int:
    return sum(placed["bytes_sent"] for placed in run.stats.loras)


@pytest.mark.parametrize("cut", [":0", ":1", ":3", ":5"])
def test_any_cut_gives_what_the_whole_model_gives(rig: Rig, cut: str) -> None:
    sets: Sequence[list[Applied]] = [
        [Applied(rig.ink, 0.75)],
        [Applied(rig.ink, 1.0), Applied(rig.chalk, -0.5)],
        [Applied(rig.chalk, -0.5), Applied(rig.ink, 1.0)],
        [Applied(rig.chalk, 0.3)],
        [],
    ]
    with split(rig.path, cut, rig.workers[:1], rig.plugins) as run:
        for applied in sets:
            run.set_loras(applied)
            assert torch.equal(run(rig.inputs), rig.whole(*applied))
    assert not torch.equal(rig.whole(*sets[0]), rig.whole())


def test_a_chain_of_workers_each_gets_its_own_part_once(rig: Rig, tmp_path: Path) -> None:
    file = loras.save(tmp_path / "fresh.safetensors", loras.peft(loras.modules(rig.model), rank=4, seed=200))
    fresh = Applied(read_lora(file, rig.checkpoint), 0.6)
    with split(rig.path, ":1", rig.workers, rig.plugins) as run:
        run.set_loras([fresh])
        assert torch.equal(run(rig.inputs), rig.whole(fresh))
        placed = run.stats.loras
        assert len(placed) == 2 and all(p["bytes_sent"] for p in placed)
        parts = sum(p["bytes_sent"] for p in placed)
        assert fresh.lora.nbytes * 0.5 < parts < fresh.lora.nbytes * 1.5
    with split(rig.path, ":1", rig.workers, rig.plugins) as run:
        run.set_loras([Applied(fresh.lora, 0.2)])
        assert [p["action"] for p in run.stats.loras] == ["reference", "reference"] and sent(run) == 0
        assert torch.equal(run(rig.inputs), rig.whole(Applied(fresh.lora, 0.2)))


def test_a_second_use_sends_less_than_a_kilobyte(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    crossed: list[int] = []
    pack = wire.pack

    def counting(message: wire.Message, buffers: Sequence[Any] = ()) -> Any:
        frames = pack(message, buffers)
        if isinstance(message, (wire.Seek, wire.Offer, wire.Chunk, wire.Adjust)):
            crossed.append(sum(memoryview(f).nbytes for f in frames))
        return frames

    for _ in range(2):
        with split(rig.path, ":0", rig.workers[:1], rig.plugins) as run:
            crossed.clear()
            monkeypatch.setattr(wire, "pack", counting)
            run.set_loras([Applied(rig.chalk, 0.4)])
            monkeypatch.setattr(wire, "pack", pack)
    assert 0 < sum(crossed) < 1000


def test_a_hundred_changes_leave_no_trace_and_read_no_weights(rig: Rig) -> None:
    some = Lora.of("some", rig.checkpoint.spec, [*rig.ink.patches[::6], *rig.chalk.patches[::6]])
    with split(rig.path, ":2", rig.workers[:1], rig.plugins) as run:
        plain = run(rig.inputs)
        for i in range(100):
            run.set_loras([Applied(some, i / 7 - 5)])
        (session,) = rig.workers[0].worker.sessions
        assert session.loaded.bytes_read == 0
        run.set_loras([])
        assert torch.equal(run(rig.inputs), plain)


def test_sessions_with_other_loras_share_what_is_not_patched(rig: Rig) -> None:
    stages = rig.workers[0].worker.stages
    part = Lora.of("one", rig.checkpoint.spec, rig.ink.patches[:1])
    with split(rig.path, ":0", rig.workers[:1], rig.plugins) as plain:
        expected, before = plain(rig.inputs), stages.nbytes
        with split(rig.path, ":0", rig.workers[:1], rig.plugins) as other:
            other.set_loras([Applied(part)])
            grown = stages.nbytes - before
            name = part.patches[0].target[0].parameter
            assert grown == rig.checkpoint.spec.parameters[name].elements * 4
            assert torch.equal(other(rig.inputs), rig.whole(Applied(part)))
            assert torch.equal(plain(rig.inputs), expected)
            other.set_loras([])
            assert torch.equal(other(rig.inputs), expected)


def test_two_sessions_with_the_same_loras_part_when_one_changes(rig: Rig) -> None:
    first, second = [Applied(rig.ink, 0.5)], [Applied(rig.ink, -0.5)]
    with split(rig.path, ":0", rig.workers[:1], rig.plugins) as one:
        one.set_loras(first)
        with split(rig.path, ":0", rig.workers[:1], rig.plugins) as other:
            other.set_loras(first)
            other.set_loras(second)
            assert torch.equal(other(rig.inputs), rig.whole(*second))
            assert torch.equal(one(rig.inputs), rig.whole(*first))


def test_loras_that_do_not_fit_are_refused_and_the_session_goes_on(rig: Rig) -> None:
    spec = rig.checkpoint.spec
    size = span_bytes(spec, spec.span(":"), 4)
    with thread_workers(rig.path, 1, plugins=rig.plugins, memory=size + 1000) as workers:
        with split(rig.path, ":0", workers, rig.plugins) as run:
            with pytest.raises(PlanDoesNotFit, match=r"need .* MB"):
                run.set_loras([Applied(rig.ink)])
            assert torch.equal(run(rig.inputs), rig.whole())
            assert workers[0].worker.stages.nbytes == size


def test_a_worker_that_restarts_has_the_same_loras_again(rig: Rig) -> None:
    applied = [Applied(rig.ink, 0.9)]
    # Within one process a restarted worker would have another address.
    with thread_workers(rig.path, 1, "mesh", plugins=rig.plugins) as (worker,):
        with split(rig.path, ":1", [worker], rig.plugins) as run:
            run.set_loras(applied)
            worker.restart()
            assert torch.equal(run(rig.inputs), rig.whole(*applied))
            assert run.stats.reconnects >= 1
