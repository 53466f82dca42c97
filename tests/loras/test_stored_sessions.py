"""LoRAs on a split model whose weights are stored: whatever the cut, what the whole model gives, and what it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mesh_core.errors import CheckpointUnrecognised, PlanDoesNotFit
from mesh_core.loras import apply, device_tensors, stored_changes
from mesh_core.loras.lora import Applied, Lora
from mesh_core.loras.memory import NamedPatch, lora_from_patches
from mesh_core.loras.read import read_lora
from mesh_core.loras.work import transient_of, work_of
from mesh_core.model import fingerprint
from mesh_core.model.library import Checkpoint
from mesh_core.model.numerics import LORA, ON_NUMBERS, Numerics, usual_numerics
from mesh_core.model.sizes import span_bytes, transient
from mesh_core.model.stored_weight import StoredWeight
from mesh_core.plugins.registry import Plugins
from mesh_core.worker.stage_table import StageKey
from mesh_core.worker.stages import StageStore
from tests.adapters import tiny
from tests.support import eight_bits, loras
from tests.support.splitting import checkpoint_at, split
from tests.support.workers import ThreadWorker, process_worker, thread_workers

CPU, BF16 = torch.device("cpu"), torch.bfloat16
STORED = ("to_q", "to_k", "to_v", "linear_in", "to_qkv_mlp_proj", "to_out")


@dataclass
class Rig:
    path: Path
    checkpoint: Checkpoint
    plugins: Plugins
    workers: list[ThreadWorker]
    ink: Lora
    kinds: Lora
    inputs: dict[str, Any]

    def numerics(self, loras: str | None = None) -> Numerics:
        usual = usual_numerics(self.checkpoint.spec, BF16, CPU, self.plugins.weight_formats())
        changed = {**dict(usual.arithmetic), **({LORA: loras} if loras else {})}
        return replace(usual, arithmetic=tuple(sorted(changed.items())))

    def split(self, cut: str, loras: str | None = None, workers: list[Any] | None = None) -> Any:
        numerics = self.numerics(loras)
        return split(
            self.path,
            cut,
            self.workers[:1] if workers is None else workers,
            self.plugins,
            dtype=BF16,
            numerics=numerics,
        )

    def whole(self, *applied: Applied, loras: str | None = None) -> Tensor:
        """The unsplit model with these LoRAs."""
        with self.split(":", loras, []) as run:
            run.set_loras(applied)
            result: Tensor = run(self.inputs)
        return result

    def key(self) -> StageKey:
        spec, header = self.checkpoint.spec, self.checkpoint.header
        content = fingerprint.of_checkpoint(header, spec)
        return StageKey(fingerprint.structure(spec), content, spec.span(":"), self.numerics())


def other_kinds(checkpoint: Checkpoint) -> Lora:
    """LoKr over rows of three weights, DoRA, a difference, and a product of some rows."""
    patches = [
        NamedPatch(
            "double_blocks.0.img_attn.qkv.weight",
            "lokr",
            {"w1": loras.randn(8, 8, seed=1), "w2": loras.randn(24, 8, seed=2)},
        ),
        NamedPatch(
            "single_transformer_blocks.1.attn.to_out.weight",
            "lora",
            {
                "up": loras.randn(64, 3, seed=3),
                "down": loras.randn(3, 256, seed=4),
                "dora_scale": loras.randn(64, 1, seed=5),
            },
        ),
        NamedPatch(
            "transformer_blocks.1.ff.linear_out.weight", "diff", {"diff": loras.randn(64, 192, seed=6, scale=0.02)}
        ),
        NamedPatch(
            "transformer_blocks.1.attn.to_k.weight",
            "lora",
            {"up": loras.randn(16, 3, seed=7), "down": loras.randn(3, 64, seed=8)},
            offset=(0, 8, 16),
        ),
    ]
    return lora_from_patches(checkpoint, patches, "kinds")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("models")
    model = tiny.transformer(guidance=False, dtype=BF16)
    model.save_pretrained(folder / "klein")
    eight_bits.store(folder / "klein" / "diffusion_pytorch_model.safetensors", lambda name: "blocks" in name)
    plugins = eight_bits.plugins()
    checkpoint = checkpoint_at(folder / "klein", plugins)
    file = loras.save(folder / "host" / "ink.safetensors", loras.peft(loras.modules(model)))
    with thread_workers(folder / "klein", 1, plugins=plugins) as workers:
        inputs = tiny.inputs(guidance=False, dtype=BF16)
        yield Rig(
            folder / "klein", checkpoint, plugins, workers, read_lora(file, checkpoint), other_kinds(checkpoint), inputs
        )


@pytest.mark.parametrize("how", [None, ON_NUMBERS])
def test_any_cut_gives_what_the_whole_model_gives(rig: Rig, how: str | None) -> None:
    sets = [
        [Applied(rig.ink, 0.75)],
        [Applied(rig.ink, 1.0), Applied(rig.kinds, -0.5)],
        [Applied(rig.kinds, 0.5), Applied(rig.ink, 0.2)],
        [Applied(rig.ink, 0.3, 0.9)],
        [],
    ]
    expected = [rig.whole(*applied, loras=how) for applied in sets]
    for cut in range(rig.checkpoint.spec.blocks):
        with rig.split(f":{cut}", how) as run:
            for applied, result in zip(sets, expected, strict=True):
                run.set_loras(applied)
                assert torch.equal(run(rig.inputs), result), cut
    assert len({result.view(torch.int16).numpy().tobytes() for result in expected}) == len(sets)


def test_the_two_ways_are_two_and_both_near(rig: Rig) -> None:
    beside, merged = (rig.whole(Applied(rig.ink, 0.75), loras=how) for how in (None, ON_NUMBERS))
    assert not torch.equal(beside, merged)
    assert (beside - merged).float().norm() < 0.02 * merged.float().norm()


def test_a_way_that_a_worker_does_not_know_is_refused_by_name(rig: Rig) -> None:
    with pytest.raises(CheckpointUnrecognised, match="'mesh/beside-2'; possible: mesh/beside-1, mesh/dense-1"):
        with rig.split(":0", "mesh/beside-2"):
            pass


def test_a_worker_in_a_process_of_its_own(rig: Rig) -> None:
    applied = [Applied(rig.ink, 0.75), Applied(rig.kinds, 0.5)]
    expected = rig.whole(*applied)
    with process_worker(rig.path, program=("-m", "tests.support.eight_bits")) as worker:
        with rig.split(":1", None, [worker.address]) as run:
            run.set_loras(applied)
            assert torch.equal(run(rig.inputs), expected)


def only_stored(rig: Rig) -> Lora:
    held = {name for name, p in rig.checkpoint.spec.parameters.items() if p.stored_bytes is not None}
    return rig.ink.restricted(held)


def held(lora: Lora) -> int:
    """Bytes of a LoRA of float32: products are held in the type of the weights, the rest in its own."""
    return sum(p.nbytes // 2 if p.algorithm == "lora" and len(p.tensors) == 2 else p.nbytes for p in lora.patches)


def test_a_stage_holds_its_weights_and_the_loras_tensors_and_nothing_else(rig: Rig) -> None:
    """Also two stages with one LoRA in two strengths."""
    spec, ink = rig.checkpoint.spec, only_stored(rig)
    store = StageStore(CPU, 1 << 30)
    plain = store.acquire(rig.checkpoint, rig.key())
    base = store.nbytes
    assert (
        base
        == sum(p.nbytes(2) for p in spec.parameters.values())
        < sum(2 * p.elements for p in spec.parameters.values())
    )
    first = store.adjust(rig.checkpoint, plain, [Applied(ink, 0.5)])
    assert store.nbytes == base + held(ink)
    key = replace(rig.key(), loras=((ink.id, 0.9, 1.0),))
    second = store.acquire(rig.checkpoint, key, loras=[Applied(ink, 0.9)])
    assert (second.bytes_read, store.nbytes) == (0, base + held(ink))
    merged = store.adjust(rig.checkpoint, second, [Applied(rig.ink, 0.9)])
    plain_ones = patched(rig.ink) - patched(ink)
    grown = sum(2 * spec.parameters[name].elements for name in plain_ones)
    assert store.nbytes == base + held(ink) + grown
    for loaded in (merged, first):
        store.adjust(rig.checkpoint, loaded, [])
    store.clear()
    del plain, first, second, merged, loaded
    assert store.nbytes == base


def test_room_is_made_for_exactly_what_is_held(rig: Rig) -> None:
    spec, ink = rig.checkpoint.spec, only_stored(rig)
    needed = span_bytes(spec, spec.span(":")) + held(ink)
    key, applied = replace(rig.key(), loras=((ink.id, 0.5, 1.0),)), [Applied(ink, 0.5)]
    with pytest.raises(PlanDoesNotFit):
        StageStore(CPU, needed - 1).acquire(rig.checkpoint, key, loras=applied)
    store = StageStore(CPU, needed)
    loaded = store.acquire(rig.checkpoint, key, loras=applied)
    # Another one of the same size takes the place of the first; one that is larger is refused, and the first stays.
    other = lora_like(rig, rank=loras.RANK)
    loaded = store.adjust(rig.checkpoint, loaded, [Applied(other)])
    assert store.nbytes == sum(p.nbytes(2) for p in spec.parameters.values()) + held(other)
    before = result(loaded.stage.model, rig)
    with pytest.raises(PlanDoesNotFit):
        store.adjust(rig.checkpoint, loaded, [Applied(lora_like(rig, rank=loras.RANK + 1))])
    assert torch.equal(result(loaded.stage.model, rig), before)
    assert torch.equal(before, rig.whole(Applied(other)))


def test_room_for_numbers_of_the_moment_is_counted(rig: Rig) -> None:
    spec, applied = rig.checkpoint.spec, [Applied(rig.kinds, 0.5)]
    work = work_of(applied, frozenset(spec.parameters))
    moment = transient_of(work, spec.parameters, beside=True)
    assert moment > transient(spec.parameters)
    needed = sum(p.nbytes(2) for p in spec.parameters.values()) + held(rig.kinds) + moment
    key = replace(rig.key(), loras=((rig.kinds.id, 0.5, 1.0),))
    with pytest.raises(PlanDoesNotFit):
        StageStore(CPU, needed - 1).acquire(rig.checkpoint, key, loras=applied)
    StageStore(CPU, needed).acquire(rig.checkpoint, key, loras=applied)


def lora_like(rig: Rig, rank: int) -> Lora:
    shapes = {
        n.removesuffix(".weight"): p.shape
        for n, p in rig.checkpoint.spec.parameters.items()
        if p.stored_bytes is not None
    }
    file = loras.save(rig.path.parent / f"rank-{rank}.safetensors", loras.peft(shapes, rank=rank, seed=500))
    return read_lora(file, rig.checkpoint)


def result(model: nn.Module, rig: Rig) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(**rig.inputs, return_dict=False)[0]
    return made


def test_a_changed_strength_reads_and_merges_nothing_and_undoing_gives_the_same_objects(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ink = only_stored(rig)
    expected = {strength: rig.whole(Applied(ink, strength)) for strength in (0.5, 0.25)}
    with rig.split(":2") as run:
        (session,) = rig.workers[0].worker.sessions
        models = (run.local.model, session.loaded.stage.model)
        before = [dict(model.named_parameters()) for model in models]
        run.set_loras([Applied(ink, 0.5)])
        assert torch.equal(run(rig.inputs), expected[0.5])

        def unwanted(*_: object) -> None:
            raise AssertionError("read or merged")

        with monkeypatch.context() as watched:
            for place, name in ((device_tensors, "check_finite"), (apply, "merge"), (stored_changes, "merge")):
                watched.setattr(place, name, unwanted)
            fresh = read_lora(ink.patches[0].tensors["up"].file.path, rig.checkpoint)  # type: ignore[attr-defined]
            run.set_loras([Applied(fresh.restricted(patched(ink)), 0.25)])
        assert torch.equal(run(rig.inputs), expected[0.25])
        run.set_loras([])
        assert session.loaded.bytes_read == 0
        for model, parameters in zip(models, before, strict=True):
            now = dict(model.named_parameters())
            assert all(now[name] is parameters[name] for name in parameters)
            assert any(isinstance(p, StoredWeight) for p in now.values())


def patched(lora: Lora) -> set[str]:
    return {name for patch in lora.patches for name in patch.parameters}
