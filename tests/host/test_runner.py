"""Deciding what runs where: workers are asked, spans are checked, and a refusal leaves no connection behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from mesh_core.builtin import load_plugins
from mesh_core.crossing.bandwidth import Link
from mesh_core.errors import ConfigError, PlanError, RemoteError, Unreachable
from mesh_core.hookspecs import hookimpl
from mesh_core.host.options import SessionOptions
from mesh_core.host.runner import Placement, place
from mesh_core.model.numerics import Numerics
from mesh_core.model.plan import Hop
from mesh_core.model.spans import BlockSpan
from mesh_core.plugins.registry import Plugins
from mesh_core.system.config import Deadlines, Settings
from tests.adapters import tiny
from tests.support.splitting import checkpoint_at, split
from tests.support.workers import ThreadWorker, thread_workers

OPTIONS = SessionOptions(
    Numerics(torch.float32), torch.device("cpu"), settings=Settings(deadlines=Deadlines(connect=0.3))
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "klein"
    tiny.transformer(guidance=False).save_pretrained(path)
    return path


@pytest.fixture
def plugins() -> Plugins:
    return load_plugins()


@pytest.fixture
def workers(path: Path, plugins: Plugins) -> Iterator[list[ThreadWorker]]:
    with thread_workers(path.parent, 3, plugins=plugins) as workers:
        yield workers


def spans(placement: Placement) -> list[str]:
    placement.close()
    return [str(h.span) for h in placement.plan.hops]


def connected(workers: list[ThreadWorker]) -> list[int]:
    return [len(w.worker.listener.peers) for w in workers]  # type: ignore[attr-defined]


def test_one_worker_needs_no_list(path: Path, plugins: Plugins, workers: list[ThreadWorker]) -> None:
    found = place(checkpoint_at(path, plugins), ":2", workers[0].address, plugins, OPTIONS, None)
    assert spans(found) == ["0:2", "2:5"]


@pytest.mark.parametrize("worker", [7801, None, ("mesh://a", ":2", "x"), ("mesh://a", 3)], ids=str)
def test_what_is_no_worker_is_told_before_anybody_is_called(path: Path, plugins: Plugins, worker: Any) -> None:
    with pytest.raises(ConfigError, match="neither an address nor an address with a span"):
        place(checkpoint_at(path, plugins), ":2", [worker], plugins, OPTIONS, None)


def test_workers_without_a_span_share_what_the_host_leaves(
    path: Path, plugins: Plugins, workers: list[ThreadWorker]
) -> None:
    found = place(checkpoint_at(path, plugins), ":2", [w.address for w in workers], plugins, OPTIONS, None)
    assert [r.address.text for r in found.remotes] == [w.address for w in workers]
    assert spans(found) == ["0:2", "2:3", "3:4", "4:5"]


def test_workers_without_work_are_let_go(path: Path, plugins: Plugins, workers: list[ThreadWorker]) -> None:
    found = place(checkpoint_at(path, plugins), ":4", [w.address for w in workers], plugins, OPTIONS, None)
    assert len(found.remotes) == 1 and [bool(n) for n in connected(workers)].count(True) == 1
    found.close()


def test_spans_that_do_not_fit_are_refused_before_anybody_is_called(path: Path, plugins: Plugins) -> None:
    with pytest.raises(PlanError, match="block 2 is expected next"):
        place(checkpoint_at(path, plugins), ":2", [("inproc://nobody", "3:")], plugins, OPTIONS, None)


def test_one_unreachable_worker_lets_the_others_go(path: Path, plugins: Plugins, workers: list[ThreadWorker]) -> None:
    with pytest.raises(Unreachable, match="nobody"):
        place(checkpoint_at(path, plugins), ":2", [workers[0].address, "inproc://nobody"], plugins, OPTIONS, None)
    assert connected(workers) == [0, 0, 0]


class Reversed:
    """A plugin that gives the last worker the first blocks."""

    @hookimpl
    def mesh_propose_split(self, model: Any, workers: Any, links: Any) -> Any:
        assert workers[0].name == "host" and workers[0].free == 7
        assert all(w.free > 0 for w in workers[1:]), "workers say what they offer"
        return [Hop(BlockSpan(0, 1), 0), Hop(BlockSpan(1, 3), 2), Hop(BlockSpan(3, 5), 1)]


def test_a_plugin_may_propose_the_cut(path: Path, plugins: Plugins, workers: list[ThreadWorker]) -> None:
    plugins.hook  # noqa: B018  (loads what is installed)
    plugins._manager.register(Reversed(), "reversed")
    addresses = [w.address for w in workers[:2]]
    found = place(checkpoint_at(path, plugins), None, addresses, plugins, OPTIONS, 7)
    assert [r.address.text for r in found.remotes] == addresses[::-1]
    assert spans(found) == ["0:1", "1:3", "3:5"]


def test_whoever_proposes_the_cut_knows_how_fast_the_links_are(
    path: Path, plugins: Plugins, workers: list[ThreadWorker]
) -> None:
    class Curious:
        seen: ClassVar[list[Link | None]] = []

        @hookimpl
        def mesh_propose_split(self, links: Sequence[Link | None]) -> None:
            self.seen += links

    plugins.hook  # noqa: B018  (loads what is installed)
    plugins._manager.register(Curious(), "curious")
    placement = place(checkpoint_at(path, plugins), None, [w.address for w in workers], plugins, OPTIONS, None)
    here, *others = Curious.seen
    assert [remote.measured()[0] for remote in placement.remotes] == others, "the session need not measure again"
    placement.close()
    assert here is None and len(others) == 3
    assert all(link is not None and link.bandwidth > 1e6 and link.latency > 0 for link in others)


def test_what_the_steps_cost_is_told_and_counted(path: Path, plugins: Plugins, workers: list[ThreadWorker]) -> None:
    seen: list[Any] = []

    class Listening:
        @hookimpl
        def mesh_step_started(self, step: int) -> None:
            seen.append(("started", step))

        @hookimpl
        def mesh_step_finished(self, step: int, stats: Any) -> None:
            seen.append(("finished", step, len(stats.hops)))

        @hookimpl
        def mesh_step_failed(self, step: int, error: BaseException) -> None:
            seen.append(("failed", step, type(error).__name__))

    plugins.hook  # noqa: B018
    plugins._manager.register(Listening(), "listening")
    with split(path, ":0", workers[:2], plugins) as run:
        run(tiny.inputs(guidance=False))
        broken = tiny.inputs(guidance=False)
        broken["encoder_hidden_states"] = broken["encoder_hidden_states"].to(torch.bfloat16)
        with pytest.raises(RemoteError, match="w0") as caught:
            run(broken)
        assert "Traceback" in caught.value.remote_traceback
        run(tiny.inputs(guidance=False))
    assert [e[:2] for e in seen] == [
        ("started", 1),
        ("finished", 1),
        ("started", 2),
        ("failed", 2),
        ("started", 3),
        ("finished", 3),
    ]
    assert seen[1][2] == 2
