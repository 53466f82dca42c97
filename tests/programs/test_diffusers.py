"""A diffusers pipeline cut over workers gives the pictures that the whole one gives, and can be put together again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

import mesh_core
from mesh_core.builtin import load_plugins
from mesh_core.errors import ConfigError, MeshError, PlanError, UnsupportedInput
from mesh_core.host.progress import Activity
from mesh_core.plugins.registry import Plugins
from mesh_core.programs.diffusers import stats
from mesh_core.system.config import Deadlines, Settings
from mesh_core.worker.stages import StageStore
from tests.support import pipelines
from tests.support.workers import ThreadWorker, thread_workers, wait_until

BLOCKS = 5


@dataclass
class Rig:
    """Two pipelines on disk, the pictures that they make when they are whole, and two workers."""

    folder: Path
    plugins: Plugins
    workers: list[ThreadWorker]

    @property
    def klein(self) -> Path:
        return self.folder / "klein"

    @property
    def addresses(self) -> list[str]:
        return [w.address for w in self.workers]

    def load(self, local: str | None = ":2", name: str = "klein", **options: Any) -> Any:
        options = {"workers": self.addresses, "device": "cpu", "plugins": self.plugins, **options}
        return mesh_core.load_pipeline(self.folder / name, local=local, **options)

    def split(self, pipeline: Any, local: str | None = ":2", **options: Any) -> Any:
        return mesh_core.split(pipeline, local=local, **{"workers": self.addresses, "plugins": self.plugins, **options})

    def whole(self, name: str = "klein", **options: Any) -> Any:
        return Flux2KleinPipeline.from_pretrained(self.folder / name, dtype=torch.bfloat16, **options)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder, plugins = tmp_path_factory.mktemp("models"), load_plugins()
    pipelines.save(folder / "klein")
    pipelines.save(folder / "base", distilled=False)
    with thread_workers(folder, 2, "inproc", plugins=plugins) as workers:
        yield Rig(folder, plugins, workers)


@pytest.fixture(scope="module")
def expected(rig: Rig) -> torch.Tensor:
    return pipelines.run(rig.whole())


@pytest.fixture
def whole(rig: Rig) -> Iterator[Any]:
    pipeline = rig.whole()
    yield pipeline
    mesh_core.unsplit(pipeline)


def on_meta(pipeline: Any) -> set[str]:
    return {name for name, p in pipeline.transformer.named_parameters() if p.is_meta}


def state(pipeline: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in pipeline.transformer.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


def spread_over(pipeline: Any) -> list[str]:
    return [str(hop.span) for hop in pipeline.transformer.mesh.plan.hops]


@pytest.mark.parametrize("local", [":0", ":1", ":2", ":4", ":"])
def test_a_loaded_pipeline_makes_the_same_picture_and_holds_only_its_own_blocks(
    rig: Rig, expected: torch.Tensor, local: str
) -> None:
    pipeline = rig.load(local)
    assert torch.equal(pipelines.run(pipeline), expected)
    spec = pipeline.transformer.mesh.checkpoint.spec
    assert on_meta(pipeline) == spec.parameters.keys() - spec.parameters_of(spec.span(local)).keys()
    mesh_core.unsplit(pipeline)


def test_remote_blocks_are_never_read_here(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    fill = mesh_core.programs.diffusers.WeightReader.fill  # type: ignore[attr-defined]

    def noting(self: Any, model: Any, parameters: Any, **options: Any) -> None:
        if not self.model:  # the workers' readers share by the model's name, the host's does not
            read.extend(parameters)
        fill(self, model, parameters, **options)

    monkeypatch.setattr(mesh_core.programs.diffusers.WeightReader, "fill", noting)  # type: ignore[attr-defined]
    pipeline = rig.load(":1")
    spec = pipeline.transformer.mesh.checkpoint.spec
    assert set(read) == spec.parameters_of(spec.span(":1")).keys()
    pipeline.transformer.mesh.close()


def test_loading_tells_what_it_does_here_and_on_each_worker(rig: Rig) -> None:
    told: list[Activity] = []
    for worker in rig.workers:
        worker.worker.stages.clear()
    pipeline = rig.load(":1", report=told.append)
    who = {(activity.machine.partition(" ")[0], activity.phase.value) for activity in told}
    assert who >= {("this", "loading"), ("w0", "loading"), ("w1", "loading")}
    assert all(0 <= a.done <= a.total and a.unit == "bytes" for a in told)
    mesh_core.unsplit(pipeline)


def test_split_and_unsplit_leave_a_loaded_pipeline_as_it_was(rig: Rig, whole: Any, expected: torch.Tensor) -> None:
    before, cls, transformer = state(whole), type(whole.transformer), whole.transformer
    for local in (":0", ":3", ":"):
        assert rig.split(whole, local) is whole
        assert torch.equal(pipelines.run(whole), expected)
        assert mesh_core.unsplit(whole) is whole
        assert type(whole.transformer) is cls and whole.transformer is transformer
        assert same(state(whole), before) and not hasattr(whole.transformer, "mesh")
        assert torch.equal(pipelines.run(whole), expected)


def test_unsplit_reads_what_was_never_read_here(rig: Rig, expected: torch.Tensor) -> None:
    pipeline = mesh_core.unsplit(rig.load(":1"))
    assert not on_meta(pipeline) and same(state(pipeline), state(rig.whole()))
    assert torch.equal(pipelines.run(pipeline), expected)
    mesh_core.unsplit(pipeline)  # a whole pipeline stays as it is


def test_a_pipeline_is_cut_anew_and_only_the_difference_is_loaded(rig: Rig, expected: torch.Tensor) -> None:
    pipeline = rig.load(":1")
    for local, workers in ((":4", rig.addresses[:1]), (":0", rig.addresses), (":2", [(rig.addresses[1], "2:5")])):
        rig.split(pipeline, local, workers=workers)
        assert torch.equal(pipelines.run(pipeline), expected)
        spec = pipeline.transformer.mesh.checkpoint.spec
        assert on_meta(pipeline) == spec.parameters.keys() - spec.parameters_of(spec.span(local)).keys()
    wait_until(lambda: sum(len(w.worker.sessions) for w in rig.workers) == 1, what="the end of the earlier sessions")
    mesh_core.unsplit(pipeline)


def test_left_to_itself_everything_that_fits_runs_here(rig: Rig, whole: Any) -> None:
    rig.split(whole, None)
    assert spread_over(whole)[0] == f"0:{BLOCKS}"


def test_a_span_that_is_named_for_the_first_worker_says_where_the_host_ends(rig: Rig, whole: Any) -> None:
    rig.split(whole, None, workers=[(rig.addresses[0], "3:")])
    assert spread_over(whole) == ["0:3", "3:5"]


def test_a_span_for_a_later_worker_alone_is_not_guessed_around(rig: Rig, whole: Any) -> None:
    with pytest.raises(PlanError) as caught:
        rig.split(whole, None, workers=[rig.addresses[0], (rig.addresses[1], "3:")])
    assert "local" in caught.value.hint


@pytest.mark.parametrize(
    "changes", [{"num_images_per_prompt": 2}, {"prompt": ["a fox", "an owl"]}, {"width": 64}], ids=str
)
def test_batches_and_other_shapes(rig: Rig, whole: Any, changes: dict[str, Any]) -> None:
    expected = pipelines.run(whole, **changes)
    rig.split(whole)
    assert torch.equal(pipelines.run(whole, **changes), expected)


def test_reference_images(rig: Rig, whole: Any) -> None:
    reference = Image.new("RGB", (64, 64), (200, 10, 30))
    expected = pipelines.run(whole, image=reference)
    assert not torch.equal(expected, pipelines.run(whole))
    rig.split(whole)
    assert torch.equal(pipelines.run(whole, image=reference), expected)


def test_conditional_and_unconditional_passes_are_named_apart(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = rig.whole("base")
    expected = pipelines.run(pipeline, guidance_scale=4.0)
    assert not torch.equal(expected, pipelines.run(pipeline, guidance_scale=1.0))
    rig.split(pipeline)
    session = pipeline.transformer.mesh.session
    sequences: list[str] = []
    run = session.run

    def noting(*args: Any, sequence: str = "", **options: Any) -> Any:
        sequences.append(sequence)
        return run(*args, sequence=sequence, **options)

    monkeypatch.setattr(session, "run", noting)
    assert torch.equal(pipelines.run(pipeline, guidance_scale=4.0), expected)
    assert sequences == ["cond", "uncond"] * 2
    mesh_core.unsplit(pipeline)


@pytest.mark.parametrize("quality", ["transparent", "balanced", "fast"])
def test_lossy_qualities_make_nearly_the_same_picture(
    rig: Rig, whole: Any, expected: torch.Tensor, quality: str
) -> None:
    rig.split(whole, quality=quality, codec="entropy")
    error = (pipelines.run(whole) - expected).float().square().mean()
    assert 0 < error < 1e-3
    hop = stats(whole).steps[0].hops[0]
    assert hop.in_coded < hop.in_raw


def test_the_stats_cover_every_step_of_every_worker(rig: Rig, whole: Any) -> None:
    with pytest.raises(PlanError, match="not split"):
        stats(whole)
    rig.split(whole)
    pipelines.run(whole)
    assert [len(s.hops) for s in stats(whole).steps] == [2, 2]
    assert "w0" in stats(whole).table() and "w1" in stats(whole).table()


@pytest.mark.parametrize("how", ["load", "split"])
def test_moving_a_split_pipeline_moves_only_what_is_here(
    rig: Rig, whole: Any, expected: torch.Tensor, how: str
) -> None:
    pipeline = rig.load() if how == "load" else rig.split(whole)
    before = on_meta(pipeline)
    pipeline.to("cpu")
    assert on_meta(pipeline) == before
    assert torch.equal(pipelines.run(pipeline), expected)
    mesh_core.unsplit(pipeline)


def test_a_split_model_is_not_cast(rig: Rig, whole: Any, expected: torch.Tensor) -> None:
    rig.split(whole)
    for cast in (lambda: whole.transformer.to(torch.float32), whole.transformer.half, whole.transformer.float):
        with pytest.raises(UnsupportedInput) as caught:
            cast()
        assert "load_pipeline(..., dtype=" in caught.value.hint
    with pytest.raises(UnsupportedInput):
        whole.to(torch.float32)
    assert torch.equal(pipelines.run(whole), expected)


def test_a_pipeline_in_another_type_than_its_file(rig: Rig) -> None:
    expected = pipelines.run(Flux2KleinPipeline.from_pretrained(rig.klein, dtype=torch.float32))
    loaded = rig.load(dtype=torch.float32)
    assert torch.equal(pipelines.run(loaded), expected)
    mesh_core.unsplit(loaded)
    cast = Flux2KleinPipeline.from_pretrained(rig.klein, dtype=torch.float32)
    rig.split(cast)
    assert torch.equal(pipelines.run(cast), expected)
    mesh_core.unsplit(cast)


def failures(rig: Rig) -> dict[str, dict[str, Any]]:
    return {
        "a gap": {"local": ":2", "workers": [(rig.addresses[0], "3:")]},
        "nobody there": {
            "workers": [rig.addresses[0], "inproc://nobody"],
            "settings": Settings(deadlines=Deadlines(connect=0.2)),
        },
        "no such scheme": {"workers": ["telepathy://attic"]},
        "past the end": {"local": ":9"},
    }


@pytest.mark.parametrize("why", ["a gap", "nobody there", "no such scheme", "past the end"])
@pytest.mark.parametrize("start", ["whole", "split", "loaded"])
def test_when_splitting_fails_the_pipeline_is_as_it_was(
    rig: Rig, whole: Any, expected: torch.Tensor, why: str, start: str
) -> None:
    pipeline = {"whole": lambda: whole, "split": lambda: rig.split(whole), "loaded": rig.load}[start]()
    cls, meta = type(pipeline.transformer), on_meta(pipeline)
    with pytest.raises(MeshError):
        rig.split(pipeline, **failures(rig)[why])
    assert type(pipeline.transformer) is cls and on_meta(pipeline) == meta
    assert torch.equal(pipelines.run(pipeline), expected)
    mesh_core.unsplit(pipeline)


def test_a_worker_without_room_leaves_the_pipeline_as_it_was(
    rig: Rig, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = rig.load(":3", workers=rig.addresses[:1])
    pipelines.run(pipeline)
    store: StageStore = rig.workers[0].worker.stages
    monkeypatch.setattr(store.memory, "budget", store.nbytes)
    store.clear()
    monkeypatch.setattr(store.memory, "budget", store.nbytes + 1)
    with pytest.raises(mesh_core.PlanDoesNotFit, match="w0"):
        rig.split(pipeline, ":0", workers=rig.addresses[:1])
    assert torch.equal(pipelines.run(pipeline), expected)
    mesh_core.unsplit(pipeline)


def test_local_blocks_that_cannot_be_read_leave_the_pipeline_and_the_workers_as_they_were(
    rig: Rig, expected: torch.Tensor, tmp_path: Path
) -> None:
    copytree(rig.klein, tmp_path / "klein")
    pipeline = mesh_core.load_pipeline(
        tmp_path / "klein", local=":1", workers=rig.addresses[:1], device="cpu", plugins=rig.plugins
    )
    (file,) = (tmp_path / "klein" / "transformer").glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:2000])
    with pytest.raises(MeshError):
        rig.split(pipeline, ":4", workers=rig.addresses[:1])
    assert spread_over(pipeline) == ["0:1", "1:5"]
    assert torch.equal(pipelines.run(pipeline), expected)
    wait_until(lambda: sum(len(w.worker.sessions) for w in rig.workers) == 1, what="the end of the failed session")
    file.write_bytes(content)
    mesh_core.unsplit(pipeline)


def test_weights_changed_in_memory_are_another_model_for_the_worker(rig: Rig, whole: Any) -> None:
    with torch.no_grad():
        whole.transformer.proj_out.weight[0, 0] += 1
    with pytest.raises(mesh_core.CheckpointMismatch, match="same shapes, other weights"):
        rig.split(whole)


def test_a_folder_that_is_no_pipeline_is_refused_with_a_hint(rig: Rig) -> None:
    with pytest.raises(ConfigError, match=r"model_index\.json") as caught:
        mesh_core.load_pipeline(rig.klein / "transformer", plugins=rig.plugins)
    assert "split()" in caught.value.hint
    single = next((rig.klein / "transformer").glob("*.safetensors"))
    with pytest.raises(ConfigError, match="single file, which holds a transformer alone") as caught:
        mesh_core.load_pipeline(single, plugins=rig.plugins)
    assert "folder of a whole pipeline" in caught.value.hint


def test_a_file_in_the_current_folder_is_never_taken_for_the_weights_in_memory(
    rig: Rig, whole: Any, expected: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("(weights in memory)").write_text("notes")
    rig.split(whole, ":1")
    assert not on_meta(whole)
    assert torch.equal(pipelines.run(mesh_core.unsplit(whole)), expected)
