"""Steps are judged by what their headers announce, before anything is decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mesh_codec.errors import CodecCorrupt
from mesh_core.builtin import load_plugins
from mesh_core.errors import Cancelled, PlanDoesNotFit, TransportTimeout, WireMalformed
from mesh_core.model.numerics import Numerics
from mesh_core.model.spans import BlockSpan
from mesh_core.worker.bounds import StepBounds
from mesh_core.worker.stage_table import StageKey
from mesh_core.worker.stages import StageStore
from tests.adapters import tiny
from tests.support.splitting import checkpoint_at

CPU = torch.device("cpu")
TEXT, IMAGE, WIDTH = 7, 16, 64
IDS = {
    "img_ids": torch.zeros(IMAGE, 4, dtype=torch.int64),
    "txt_ids": torch.zeros(TEXT, 4, dtype=torch.int64),
}
CONSTANTS = {0: {**IDS, "encoder_hidden_states": torch.zeros(1, TEXT, 48)}, 1: IDS, 3: IDS}
STATES: dict[int, dict[str, list[int]]] = {
    0: {"hidden_states": [1, IMAGE, 16], "timestep": [1]},
    1: {"hidden_states": [1, IMAGE, WIDTH], "encoder_hidden_states": [1, TEXT, WIDTH], "temb": [1, WIDTH]},
    3: {"hidden_states": [1, TEXT + IMAGE, WIDTH], "temb": [1, WIDTH]},
}
"""What an honest host sends at cuts of the model, of two double blocks and three single ones."""

Check = Callable[..., None]


@pytest.fixture
def check(path: Path) -> Check:
    checkpoint = checkpoint_at(path, load_plugins())

    def check(
        cut: int,
        shapes: Mapping[str, list[int]],
        dtype: str = "float32",
        constants: Mapping[str, Tensor] | None = None,
        memory: int = 64 << 20,
        seconds: float = 60.0,
    ) -> None:
        bounds = StepBounds(checkpoint, BlockSpan(cut, 5), torch.float32, CPU, memory)
        entries = [{"n": name, "h": {"dtype": dtype, "shape": shape}} for name, shape in shapes.items()]
        bounds.check(entries, CONSTANTS[cut] if constants is None else constants, seconds)

    return check


@pytest.mark.parametrize("cut", STATES)
def test_what_a_host_sends_is_accepted(check: Check, cut: int) -> None:
    check(cut, STATES[cut])
    check(cut, STATES[cut], dtype="bfloat16")
    several = {name: [1 if name == "temb" else 4, *shape[1:]] for name, shape in STATES[cut].items()}
    text = {"encoder_hidden_states": torch.zeros(4, TEXT, 48)} if cut == 0 else {}
    check(cut, several, constants={**IDS, **text})


WRONG: dict[str, tuple[int, dict[str, list[int]], type[Exception]]] = {
    "another width": (1, {"hidden_states": [1, IMAGE, 2 * WIDTH]}, WireMalformed),
    "another rank": (1, {"hidden_states": [IMAGE, WIDTH]}, WireMalformed),
    "more tokens than positions": (1, {"hidden_states": [1, IMAGE + 1, WIDTH]}, WireMalformed),
    "more tokens than text and image": (3, {"hidden_states": [1, TEXT + IMAGE + 1, WIDTH]}, WireMalformed),
    "batches that differ": (1, {"hidden_states": [2, IMAGE, WIDTH], "temb": [3, WIDTH]}, WireMalformed),
    "no size": (1, {"hidden_states": [-1, IMAGE, WIDTH]}, CodecCorrupt),
    "a batch without end": (3, {"hidden_states": [1 << 15, TEXT + IMAGE, WIDTH]}, PlanDoesNotFit),
    "one row for a batch without end": (1, {"temb": [1 << 15, WIDTH]}, PlanDoesNotFit),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_the_stage_or_its_memory_is_refused(check: Check, name: str) -> None:
    cut, change, error = WRONG[name]
    with pytest.raises(error):
        check(cut, {**STATES[cut], **change})


def test_one_token_for_positions_without_end_is_refused(check: Check) -> None:
    many = {**IDS, "img_ids": torch.zeros(1 << 20, 4, dtype=torch.int64)}
    with pytest.raises(PlanDoesNotFit) as caught:
        check(1, {**STATES[1], "hidden_states": [1, 1, WIDTH]}, constants=many)
    assert "step_memory" in caught.value.hint


@pytest.mark.parametrize("dtype", ["int64", "complex64", "float64", "bool"])
def test_types_that_no_model_computes_in_are_refused(check: Check, dtype: str) -> None:
    with pytest.raises(WireMalformed, match=dtype):
        check(3, STATES[3], dtype=dtype)


def test_a_step_that_no_deadline_can_wait_for_is_refused(check: Check) -> None:
    shapes = {**STATES[3], "hidden_states": [1 << 18, TEXT + IMAGE, WIDTH]}
    with pytest.raises(TransportTimeout, match="would take"):
        check(3, shapes, memory=1 << 50, seconds=0.01)


def test_cancelling_reaches_into_a_block(path: Path) -> None:
    looked, finished = 0, 0

    def before_layer() -> None:
        nonlocal looked
        looked += 1
        if looked == 5:
            raise Cancelled("enough")

    def after_block(*_: Any) -> None:
        nonlocal finished
        finished += 1

    checkpoint = checkpoint_at(path, load_plugins())
    store = StageStore(CPU, 1 << 30, before_layer)
    stage = store.acquire(checkpoint, StageKey("s", "f", BlockSpan(0, 5), Numerics(torch.float32))).stage
    for block in stage.block_modules():
        block.register_forward_hook(after_block)
    inputs = tiny.inputs(guidance=False)
    with pytest.raises(Cancelled), torch.no_grad():
        stage(*checkpoint.adapter.begin(checkpoint.spec, inputs))
    assert finished == 0
