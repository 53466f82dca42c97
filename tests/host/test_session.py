"""Remote equals local, bit for bit, whatever the cut; and what crosses is no more than it must be."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from torch import Tensor, nn

from mesh_core import wire
from mesh_core.builtin import load_plugins
from mesh_core.crossing import constants
from mesh_core.errors import ConstantsMissing, UnsupportedInput, WireMalformed
from mesh_core.host.progress import Phase
from mesh_core.host.results import Expected, check_result, expected_at
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Deadlines, Heartbeat, Settings, WorkerSettings
from mesh_core.worker.constants import ConstantsCache
from tests.adapters import tiny
from tests.support.splitting import checkpoint_at, split
from tests.support.workers import ThreadWorker, thread_workers, wait_until

BLOCKS = 5
QUICK = Settings(deadlines=Deadlines(connect=2, load=20, step=20, reconnect=20), heartbeat=Heartbeat(0.2, 2.0))


@dataclass
class Rig:
    """A model on disk, whole in memory, and workers that can host it."""

    path: Path
    model: nn.Module
    plugins: Plugins
    workers: list[ThreadWorker]

    def whole(self, inputs: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            result: Tensor = self.model(**inputs, return_dict=False)[0]
        return result


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    path = tmp_path_factory.mktemp("models") / "klein"
    model = tiny.transformer(guidance=False)
    model.save_pretrained(path)
    return path, model


@pytest.fixture(scope="module", params=["inproc", "mesh"])
def rig(request: pytest.FixtureRequest, models: tuple[Path, nn.Module]) -> Iterator[Rig]:
    plugins = load_plugins()
    path, model = models
    with thread_workers(path.parent, 3, request.param, plugins=plugins) as workers:
        yield Rig(path, model, plugins, workers)


@pytest.fixture
def near(models: tuple[Path, nn.Module]) -> Iterator[Rig]:
    """One worker in this process, of this test alone."""
    plugins = load_plugins()
    path, model = models
    with thread_workers(path.parent, 1, "inproc", plugins=plugins, settings=QUICK) as workers:
        yield Rig(path, model, plugins, workers)


@pytest.mark.parametrize("cut", range(BLOCKS + 1))
def test_every_cut_is_exact(rig: Rig, cut: int) -> None:
    inputs = tiny.inputs(guidance=False, batch=2)
    with split(rig.path, f":{cut}", rig.workers[:1], rig.plugins) as run:
        assert torch.equal(run(inputs), rig.whole(inputs))
        assert (run.session is None) == (cut == BLOCKS)


def test_nothing_remote_needs_no_worker(models: tuple[Path, nn.Module]) -> None:
    path, model = models
    inputs = tiny.inputs(guidance=False)
    with split(path, ":", [], load_plugins()) as run:
        assert torch.equal(run(inputs), model(**inputs, return_dict=False)[0])


@pytest.mark.parametrize("spans", [("0:2", "2:5"), ("1:3", "3:5"), ("0:1", "1:2", "2:5"), ("2:3", "3:4", "4:5")])
def test_chains_are_exact_and_report_in_order(rig: Rig, spans: tuple[str, ...]) -> None:
    inputs = tiny.inputs(guidance=False, batch=2, height=3, width=7, references=1)
    workers = [(w.address, span) for w, span in zip(rig.workers, spans, strict=False)]
    with split(rig.path, f":{spans[0][0]}", workers, rig.plugins) as run:
        for _ in range(3):
            assert torch.equal(run(inputs), rig.whole(inputs))
        for step in run.stats.steps:
            assert [h.span for h in step.hops] == list(spans)
            assert [h.worker for h in step.hops] == [f"w{i}" for i in range(len(spans))]
            assert step.resent == 0


def test_one_worker_may_run_two_spans_of_a_chain(rig: Rig) -> None:
    inputs = tiny.inputs(guidance=False)
    a, b = rig.workers[0].address, rig.workers[1].address
    with split(rig.path, ":1", [(a, "1:2"), (b, "2:4"), (a, "4:5")], rig.plugins) as run:
        assert torch.equal(run(inputs), rig.whole(inputs))


@pytest.mark.parametrize("shape", [{"batch": 3, "width": 9}, {"references": 2}, {"height": 1, "width": 1}], ids=str)
def test_shapes_may_change_from_step_to_step(rig: Rig, shape: dict[str, int]) -> None:
    first, second = tiny.inputs(guidance=False), tiny.inputs(guidance=False, **shape)
    with split(rig.path, ":1", rig.workers[:2], rig.plugins) as run:
        for inputs in (first, second, first):
            assert torch.equal(run(inputs), rig.whole(inputs))


def test_bfloat16_is_exact_too(rig: Rig) -> None:
    model = tiny.transformer(guidance=False).to(torch.bfloat16)
    inputs = tiny.inputs(guidance=False, dtype=torch.bfloat16)
    with split(rig.path, ":3", rig.workers[:1], rig.plugins, dtype=torch.bfloat16) as run, torch.no_grad():
        assert torch.equal(run(inputs), model(**inputs, return_dict=False)[0])


def test_eight_sessions_at_once_on_one_worker_are_all_exact(rig: Rig) -> None:
    wrong: list[str] = []
    together = threading.Barrier(8)

    def session(seed: int) -> None:
        inputs = tiny.inputs(guidance=False, seed=seed, width=3 + seed)
        expected = rig.whole(inputs)
        try:
            with split(rig.path, f":{seed % 4}", rig.workers[:1], rig.plugins) as run:
                together.wait(30)
                for _ in range(10):
                    if not torch.equal(run(inputs), expected):
                        wrong.append(f"session {seed} is not exact")
        except Exception as error:
            wrong.append(f"session {seed}: {error!r}")

    threads = [threading.Thread(target=session, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def constants_size(inputs: dict[str, Any], local: int) -> int:
    ids: int = inputs["img_ids"][0].nbytes + inputs["txt_ids"][0].nbytes
    return ids + (inputs["encoder_hidden_states"].nbytes if local == 0 else 0)


@pytest.mark.parametrize("local", [0, 1])
def test_constants_cross_once_per_generation_and_only_to_who_needs_them(rig: Rig, local: int) -> None:
    inputs = tiny.inputs(guidance=False)
    with split(rig.path, f":{local}", rig.workers[:1], rig.plugins) as run:
        for _ in range(4):
            run(inputs)
        assert run.stats.constants_bytes == constants_size(inputs, local)


def test_a_constant_changed_in_place_crosses_again(rig: Rig) -> None:
    inputs = tiny.inputs(guidance=False)
    large = torch.randn(1, 500, 48)  # over the size up to which constants are hashed every time
    inputs |= {"encoder_hidden_states": large, "txt_ids": torch.zeros(1, 500, 4, dtype=torch.int64)}
    with split(rig.path, ":0", rig.workers[:1], rig.plugins) as run:
        for _ in range(3):
            run(inputs)
        before = run.stats.constants_bytes
        large.mul_(0.5)
        assert torch.equal(run(inputs), rig.whole(inputs))
        assert run.stats.constants_bytes == before + large.nbytes
        run(inputs)
        assert run.stats.constants_bytes == before + large.nbytes


def test_in_inference_mode_constants_made_anew_are_hashed_once_and_forgotten_when_the_session_closes(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []
    digest = constants.digest
    monkeypatch.setattr(constants, "digest", lambda coded: (hashed.append(coded.nbytes), digest(coded))[1])
    inputs = tiny.inputs(guidance=False) | {"txt_ids": torch.zeros(1, 500, 4, dtype=torch.int64)}
    texts = [torch.randn(1, 500, 48) for _ in range(2)]
    with torch.inference_mode(), split(rig.path, ":0", rig.workers[:1], rig.plugins) as run:
        for _ in range(4):
            for text in texts:
                given = inputs | {"encoder_hidden_states": text.clone()}
                assert torch.equal(run(given), rig.whole(given))
        assert run.session is not None
        copies = run.session._book._copies
        assert copies.nbytes == 2 * texts[0].nbytes
    assert hashed.count(texts[0].nbytes) == 2
    assert copies.nbytes == 0


def test_constants_that_the_worker_dropped_are_sent_again(near: Rig) -> None:
    inputs = tiny.inputs(guidance=False)
    with split(near.path, ":0", near.workers, near.plugins) as run:
        expected = run(inputs)
        near.workers[0].worker.steps.constants = ConstantsCache(torch.device("cpu"), 1 << 20)
        assert torch.equal(run(inputs), expected)
        assert [s.resent for s in run.stats.steps] == [0, 1]


def test_a_constants_cache_that_is_too_small_is_an_error_that_names_the_setting(models: tuple[Path, nn.Module]) -> None:
    inputs = tiny.inputs(guidance=False)
    sizes = [inputs["encoder_hidden_states"].nbytes, inputs["img_ids"][0].nbytes, inputs["txt_ids"][0].nbytes]
    # Each of them fits, with what surrounds it, but not all three.
    settings = replace(QUICK, worker=WorkerSettings(constants_cache=max(sizes) + 5000))
    plugins = load_plugins()
    with (
        thread_workers(models[0].parent, 1, plugins=plugins, settings=settings) as workers,
        split(models[0], ":0", workers, plugins) as run,
        pytest.raises(ConstantsMissing) as caught,
    ):
        run(inputs)
    assert "constants_cache" in caught.value.hint


@pytest.mark.parametrize("quality", ["transparent", "balanced", "fast"])
def test_lossy_qualities_send_less_in_and_between_workers_and_stay_close(rig: Rig, quality: Any) -> None:
    inputs = tiny.inputs(guidance=False, height=16, width=16, dtype=torch.bfloat16)
    model = tiny.transformer(guidance=False).to(torch.bfloat16)
    options = {"dtype": torch.bfloat16, "quality": quality, "codec": "entropy"}
    with split(rig.path, ":2", rig.workers[:2], rig.plugins, **options) as run:
        found = run(inputs)
        (step,) = run.stats.steps
        for hop in step.hops:
            assert hop.in_coded < 0.75 * hop.in_raw
        last = step.hops[-1]
        assert 0.5 * last.out_raw < last.out_coded <= last.out_raw, "the prediction crosses exact"
        assert step.codec == "entropy" and "entropy" in step.reason
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
    error = (found - expected).float().norm() / expected.float().norm()
    assert 0 < error < 0.2


def test_better_qualities_are_closer_and_larger(rig: Rig) -> None:
    inputs = tiny.inputs(guidance=False, height=16, width=16)
    errors, sizes = [], []
    for quality in ("fast", "balanced", "transparent", "lossless"):
        codec = "raw" if quality == "lossless" else "entropy"
        with split(rig.path, ":2", rig.workers[:1], rig.plugins, quality=quality, codec=codec) as run:  # type: ignore[arg-type]
            errors.append((run(inputs) - rig.whole(inputs)).norm().item())
            sizes.append(run.stats.steps[0].hops[0].in_coded)
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0
    assert sizes == sorted(sizes) and len(set(sizes)) == 4


def _entry(change: dict[str, Any]) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    return lambda entries: [{**entry, **change} for entry in entries]


def _form(**change: Any) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    return lambda entries: [{**entry, "h": {**entry["h"], **change}} for entry in entries]


@pytest.mark.parametrize(
    ("lie", "named"),
    [
        (_entry({"c": "entropy"}), "entropy"),
        (_entry({"s": {"step": 0.5}}), "step"),
        (lambda entries: [], "without the tensor 'sample'"),
        (_entry({"n": "surprise"}), "without the tensor 'sample'"),
        (lambda entries: [*entries, {**entries[0], "n": "more", "k": 0}], "'more'"),
        (_form(shape=[1, 256]), r"'sample' of shape \[1, 256\] where \[1, 16, 16\]"),
        (_form(shape=[1, 8, 32]), r"'sample' of shape"),
        (_form(shape=[1, 1 << 20, 16]), r"'sample' of shape"),
        (_form(shape="large"), r"'sample' of shape large"),
        (_form(dtype="int32"), "'sample' of dtype int32 where float32"),
        (_form(dtype=7), "'sample' of dtype 7"),
    ],
    ids=range(11),
)
def test_a_worker_that_answers_with_anything_else_than_agreed_is_refused_and_named(
    near: Rig,
    lie: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replies = near.workers[0].worker.replies
    send = replies.send

    def lying(route: bytes, message: wire.Message, buffers: Any = ()) -> None:
        if isinstance(message, wire.Result):
            entries = lie(list(message.tensors))
            message, buffers = structs.replace(message, tensors=entries), buffers[: sum(e["k"] for e in entries)]
        send(route, message, buffers)

    with split(near.path, ":2", near.workers, near.plugins) as run:
        monkeypatch.setattr(replies, "send", lying)
        with pytest.raises(WireMalformed, match=named) as caught:
            run(tiny.inputs(guidance=False))
        assert "w0" in caught.value.message
        monkeypatch.setattr(replies, "send", send)
        inputs = tiny.inputs(guidance=False)
        assert torch.equal(run(inputs), near.whole(inputs)), "the session survives"


def test_a_state_that_is_relayed_is_held_to_its_cut_too(near: Rig) -> None:
    adapter = near.plugins.adapter("klein")
    spec = checkpoint_at(near.path, near.plugins).spec
    state, conditioning = adapter.begin(spec, tiny.inputs(guidance=False))
    tokens = len(conditioning.constants["img_ids"]), len(conditioning.constants["txt_ids"])
    expected = expected_at(2, 0, state, conditioning, spec, adapter)
    assert expected["hidden_states"] == Expected(True, "float32", [1, sum(tokens), 64])
    entry = {"n": "temb", "h": {"dtype": "bfloat16", "shape": [1, 64]}}
    hidden = {"n": "hidden_states", "h": {"dtype": "float32", "shape": [1, tokens[0], 64]}}
    with pytest.raises(WireMalformed, match="w0 answered with a tensor 'hidden_states' of shape"):
        check_result("w0", [entry, hidden], expected)


def test_what_cannot_cross_is_refused_before_anything_is_sent(rig: Rig) -> None:
    with split(rig.path, ":2", rig.workers[:1], rig.plugins) as run:
        with pytest.raises(UnsupportedInput, match="ip_adapter"):
            run({**tiny.inputs(guidance=False), "joint_attention_kwargs": {"ip_adapter_masks": 1}})
        assert run.stats.steps == []


def test_a_worker_restarted_between_two_steps_changes_nothing(rig: Rig) -> None:
    inputs = tiny.inputs(guidance=False)
    with split(rig.path, ":1", rig.workers, rig.plugins, settings=QUICK) as run:
        expected = run(inputs)
        for worker in rig.workers:
            worker.restart()
            assert torch.equal(run(inputs), expected)
        assert run.stats.reconnects >= 3 and all(s.resent for s in run.stats.steps[1:])


def test_a_worker_that_stays_away_for_a_while_is_waited_for(near: Rig) -> None:
    inputs, told = tiny.inputs(guidance=False), []
    with split(near.path, ":1", near.workers, near.plugins, settings=QUICK, report=told.append) as run:
        expected = run(inputs)
        near.workers[0].stop()
        back = threading.Timer(0.7, near.workers[0].start)
        back.start()
        assert torch.equal(run(inputs), expected)
        assert any(activity.phase is Phase.WAITING and "waiting" in activity.words for activity in told)
        back.join()


def test_a_worker_out_of_reach_of_its_neighbour_is_relayed_through_the_host(
    models: tuple[Path, nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    path, model = models
    plugins, inputs = load_plugins(), tiny.inputs(guidance=False)
    # Worker A has an in-process network of its own beside the one that it serves: it cannot see B there.
    with thread_workers(path.parent, 3, plugins=plugins, settings=QUICK) as workers:
        first = workers[0].worker
        first.opener.plugins = load_plugins()
        first.opener.settings = replace(QUICK, deadlines=replace(QUICK.deadlines, connect=0.2))
        with split(path, ":1", workers, plugins, settings=QUICK) as run, torch.no_grad():
            for _ in range(2):
                assert torch.equal(run(inputs), model(**inputs, return_dict=False)[0])
            assert [h.worker for h in run.stats.steps[-1].hops] == ["w0", "w1", "w2"]
            assert len(run.session._legs) == 2, "only the one link is relayed"
    assert "goes through this machine instead" in caplog.text


def test_closing_frees_the_stage_on_every_worker(rig: Rig) -> None:
    def users() -> list[int]:
        return [sum(w.worker.stages.table.users().values()) for w in rig.workers]

    wait_until(lambda: users() == [0, 0, 0], what="the end of earlier sessions")
    with split(rig.path, ":1", rig.workers, rig.plugins) as run:
        run(tiny.inputs(guidance=False))
        assert users() == [1, 1, 1]
    wait_until(lambda: users() == [0, 0, 0], what="the stages' release")
    assert [len(w.worker.sessions) for w in rig.workers] == [0, 0, 0]


def test_after_a_step_nothing_keeps_the_weights_of_a_closed_session(near: Rig) -> None:
    stages = near.workers[0].worker.stages
    with split(near.path, ":0", near.workers, near.plugins) as run:
        run(tiny.inputs(guidance=False))
    wait_until(lambda: len(near.workers[0].worker.sessions) == 0)
    stages.clear()
    wait_until(lambda: stages.nbytes == 0, 2, "freeing the weights without the garbage collector")
