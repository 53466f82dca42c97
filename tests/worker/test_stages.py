"""The stages of a worker: shared, loaded once, and freed when the memory is needed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from torch import nn

from mesh_core.builtin import load_plugins
from mesh_core.errors import Cancelled, PlanDoesNotFit
from mesh_core.loras.lora import Applied
from mesh_core.loras.read import read_lora
from mesh_core.model import fingerprint
from mesh_core.model.library import Checkpoint
from mesh_core.model.numerics import Numerics
from mesh_core.model.sizes import span_bytes
from mesh_core.model.spans import BlockSpan
from mesh_core.worker.stage_table import StageKey
from mesh_core.worker.stages import Loaded, StageStore
from tests.adapters import tiny
from tests.support import loras
from tests.support.splitting import checkpoint_at

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    folder, plugins = tmp_path_factory.mktemp("models"), load_plugins()
    return [checkpoint_at(tiny.saved(folder / str(seed), seed=seed), plugins) for seed in (0, 1)]


@pytest.fixture
def checkpoint(checkpoints: list[Checkpoint]) -> Checkpoint:
    return checkpoints[0]


def key(checkpoint: Checkpoint, start: int, stop: int, dtype: torch.dtype = torch.float32) -> StageKey:
    content = fingerprint.of_checkpoint(checkpoint.header, checkpoint.spec)
    return StageKey(fingerprint.structure(checkpoint.spec), content, BlockSpan(start, stop), Numerics(dtype))


def acquire(store: StageStore, checkpoint: Checkpoint, start: int, stop: int) -> Loaded:
    return store.acquire(checkpoint, key(checkpoint, start, stop))


def size(checkpoint: Checkpoint, start: int, stop: int) -> int:
    return span_bytes(checkpoint.spec, BlockSpan(start, stop), 4)


def test_the_same_stage_is_loaded_once_for_all_sessions(checkpoint: Checkpoint) -> None:
    store = StageStore(CPU, 1 << 30)
    first, second = acquire(store, checkpoint, 0, 3), acquire(store, checkpoint, 0, 3)
    assert second.stage is first.stage
    assert (first.bytes_read, second.bytes_read) == (size(checkpoint, 0, 3), 0)


def test_eight_sessions_at_once_load_it_once(checkpoint: Checkpoint) -> None:
    store, together = StageStore(CPU, 1 << 30), Barrier(8)

    def session() -> Loaded:
        together.wait()
        return acquire(store, checkpoint, 0, 5)

    with ThreadPoolExecutor(8) as threads:
        loaded = [f.result() for f in [threads.submit(session) for _ in range(8)]]
    assert sum(item.bytes_read for item in loaded) == size(checkpoint, 0, 5) == store.nbytes
    assert len({id(item.stage) for item in loaded}) == 1


def test_a_changed_span_reads_only_the_difference(checkpoint: Checkpoint) -> None:
    store = StageStore(CPU, 1 << 30)
    first = acquire(store, checkpoint, 0, 3)
    wider = acquire(store, checkpoint, 0, 5)
    assert wider.bytes_read == size(checkpoint, 0, 5) - size(checkpoint, 0, 3)
    narrower = acquire(store, checkpoint, 1, 4)
    assert narrower.bytes_read == 0 and first.stage is not wider.stage


def test_another_type_of_the_same_weights_is_another_stage(checkpoint: Checkpoint) -> None:
    store = StageStore(CPU, 1 << 30)
    acquire(store, checkpoint, 0, 1)
    half = store.acquire(checkpoint, key(checkpoint, 0, 1, torch.bfloat16))
    assert half.bytes_read > 0
    assert store.nbytes == size(checkpoint, 0, 1) * 3 // 2


def test_what_nobody_uses_stays_until_the_memory_is_needed(
    checkpoint: Checkpoint, checkpoints: list[Checkpoint]
) -> None:
    whole = size(checkpoint, 0, 5)
    store = StageStore(CPU, whole + 1000)
    store.release(acquire(store, checkpoint, 0, 5))
    assert store.nbytes == whole
    again = acquire(store, checkpoint, 0, 5)
    assert again.bytes_read == 0, "it was still there"
    store.release(again)
    del again
    other = acquire(store, checkpoints[1], 0, 5)
    assert other.bytes_read == whole and store.nbytes == whole


def test_of_idle_stages_the_one_used_longest_ago_goes_and_other_models_go_first(
    checkpoint: Checkpoint, checkpoints: list[Checkpoint]
) -> None:
    block = size(checkpoint, 3, 4)
    store = StageStore(CPU, 3 * block + size(checkpoint, 2, 3))
    for model, start in ((checkpoint, 2), (checkpoints[1], 2), (checkpoint, 3)):
        store.release(acquire(store, model, start, start + 1))
    acquire(store, checkpoint, 4, 5)
    assert acquire(store, checkpoint, 2, 4).bytes_read == 0, "the model in use was kept, the other one went"


def ink_file(folder: Path) -> Path:
    return loras.save(folder / "ink.safetensors", loras.peft(loras.modules(tiny.transformer(guidance=False))))


def test_a_stage_is_changed_in_place_only_by_the_one_that_uses_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Not by a session that had it, whatever it still believes: another one computes with it."""
    ink = read_lora(ink_file(tmp_path), checkpoint)
    store = StageStore(CPU, 4 * size(checkpoint, 0, 5))
    honest, other = acquire(store, checkpoint, 0, 5), acquire(store, checkpoint, 0, 5)
    before = {name: p.clone() for name, p in honest.stage.model.named_parameters() if not p.is_meta}
    store.adjust(checkpoint, other, [Applied(ink, 1.0)])
    store.adjust(checkpoint, other, [Applied(ink, 0.5)])
    store.release(other)
    assert all(torch.equal(p, before[name]) for name, p in honest.stage.model.named_parameters() if name in before)
    assert store.table.users()[honest.key] == 1


def test_a_stage_in_use_is_never_freed(checkpoint: Checkpoint, checkpoints: list[Checkpoint]) -> None:
    store = StageStore(CPU, size(checkpoint, 0, 5))
    used = acquire(store, checkpoint, 0, 3)
    with pytest.raises(PlanDoesNotFit, match="other sessions use") as caught:
        acquire(store, checkpoints[1], 0, 5)
    assert "--memory" in caught.value.hint
    again = acquire(store, checkpoint, 0, 3)
    assert again.stage is used.stage
    store.release(used)
    store.release(used)
    with pytest.raises(PlanDoesNotFit):
        acquire(store, checkpoints[1], 0, 5)  # one of the two users is left
    store.release(again)
    del used, again
    assert acquire(store, checkpoints[1], 0, 5).bytes_read > 0


def test_a_stage_over_the_budget_says_what_it_needs_and_what_there_is(checkpoint: Checkpoint) -> None:
    store = StageStore(CPU, 10_000)
    with pytest.raises(PlanDoesNotFit, match=r"Blocks 0:5 need .* this worker offers .*") as caught:
        acquire(store, checkpoint, 0, 5)
    assert "--memory" in caught.value.hint and store.nbytes == 0


def test_a_load_that_fails_leaves_nothing_behind(checkpoint: Checkpoint) -> None:
    store = StageStore(CPU, 1 << 30)

    def fails(done: int, total: int) -> None:
        raise OSError("the host went away")

    with pytest.raises(OSError, match="went away"):
        store.acquire(checkpoint, key(checkpoint, 0, 5), fails)
    assert store.nbytes == 0
    assert acquire(store, checkpoint, 0, 5).bytes_read == size(checkpoint, 0, 5)


def test_loras_change_though_the_untouched_weights_have_left_the_device(checkpoint: Checkpoint, tmp_path: Path) -> None:
    ink = read_lora(ink_file(tmp_path), checkpoint)
    store = StageStore(CPU, 3 * size(checkpoint, 0, 5))
    loaded = store.adjust(checkpoint, acquire(store, checkpoint, 0, 5), [Applied(ink, 1.0)])
    patched = store.table[loaded.key].patched
    # As after parking on a GPU with room for one version: what is kept in host memory is not the device's.
    for name, base in list(patched.base.items()):
        patched._base[name] = nn.Parameter(base.data.clone(), requires_grad=False)
    del base
    store.memory.budget = store.nbytes
    assert store.memory.budget < 1.2 * size(checkpoint, 0, 5)
    for strength in (0.5, 0.2):
        changed = store.adjust(checkpoint, loaded, [Applied(ink, strength)])
        assert changed.bytes_read == 0 and changed.stage is loaded.stage
        loaded = changed


def test_clear_frees_what_is_idle(checkpoint: Checkpoint) -> None:
    store = StageStore(CPU, 1 << 30)
    kept = acquire(store, checkpoint, 0, 1)
    store.release(acquire(store, checkpoint, 3, 5))
    store.clear()
    assert store.nbytes == size(checkpoint, 0, 1)
    assert kept.stage is acquire(store, checkpoint, 0, 1).stage


def test_the_work_can_be_stopped_before_every_block(checkpoint: Checkpoint) -> None:
    seen = 0

    def check() -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            raise Cancelled("enough")

    loaded = StageStore(CPU, 1 << 30, check).acquire(checkpoint, key(checkpoint, 0, 5))
    state, conditioning = checkpoint.adapter.begin(checkpoint.spec, tiny.inputs(guidance=False))
    with pytest.raises(Cancelled), torch.no_grad():
        loaded.stage(state, conditioning)
    assert seen == 3
