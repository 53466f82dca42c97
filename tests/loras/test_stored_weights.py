"""LoRAs on weights that stay as they are stored: bit for bit what PEFT or merging gives, and nothing merged or kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import peft.tuners.lora as peft_lora
import pytest
import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from mesh_core.errors import LoraError, UnsupportedInput
from mesh_core.loras import apply, device_tensors, stored_changes
from mesh_core.loras.lora import Applied, Lora
from mesh_core.loras.patch import Rows
from mesh_core.loras.work import transient_of, work_of
from mesh_core.model.spans import BlockSpan
from mesh_core.model.spec import ParameterSpec
from mesh_core.model.stored_weight import StoredWeight
from tests.support.loras import randn
from tests.support.stored_layers import (
    COLUMNS,
    NAMES,
    ROWS,
    lora,
    patched,
    product,
    stored_layer,
    stored_model,
    whole,
    with_numbers,
)

Adapter = tuple[Mapping[str, Tensor], float, float]
"""Tensors, alpha and strength."""


def by_peft(layer: nn.Linear, *adapters: Adapter) -> nn.Module:
    """``layer`` as PEFT has it with those LoRAs, which it holds in the type of the weight."""
    made: peft_lora.Linear | None = None
    for i, (tensors, alpha, strength) in enumerate(adapters):
        rank, name = tensors["down"].shape[0], str(i)
        config = peft_lora.LoraConfig(r=rank, lora_alpha=alpha)  # type: ignore[arg-type]
        if made is None:
            made = peft_lora.Linear(layer, name, config=config, r=rank, lora_alpha=alpha)  # type: ignore[arg-type]
        else:
            made.update_layer(name, rank, alpha, config=config)  # type: ignore[arg-type]
        made.lora_A[name].weight.data.copy_(tensors["down"])
        made.lora_B[name].weight.data.copy_(tensors["up"])
        made.set_scale(name, strength)
    assert made is not None
    made.set_adapter([str(i) for i in range(len(adapters))])
    return made


@pytest.mark.parametrize("second", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_layer_computes_what_peft_computes(dtype: torch.dtype, first: torch.dtype, second: torch.dtype) -> None:
    ink, chalk = product(24, 4, 50, first), product(24, 7, 60, second)
    model, x = stored_model(dtype), randn(2, 9, COLUMNS, seed=7, scale=1.0).to(dtype)
    plain = model["q"](x)
    expected = by_peft(model["q"], (ink, 3.0, 0.7), (chalk, 7.0, -1.3))(x)  # type: ignore[arg-type]
    patched(
        model,
        Applied(lora("lora", ink, whole("q"), 3.0), 0.7),
        Applied(lora("lora", chalk, whole("q")), -1.3),
    )
    assert torch.equal(model["q"](x), expected) and not torch.equal(plain, expected)


def test_a_change_of_joined_layers_is_peft_s_of_each_with_its_rows() -> None:
    model, x, joined = stored_model(), randn(9, COLUMNS, seed=7, scale=1.0).bfloat16(), product(72)
    expected = {}
    for i, name in enumerate("qkv"):
        own = {"up": joined["up"][24 * i : 24 * i + 24].clone(), "down": joined["down"]}
        expected[name] = by_peft(stored_model()[name], (own, 2.0, 0.5))(x)  # type: ignore[arg-type]
    patched(model, Applied(lora("lora", joined, whole("q", "k", "v"), 2.0), 0.5))
    for name, result in expected.items():
        assert torch.equal(model[name](x), result)


def test_a_change_of_some_rows_leaves_the_others() -> None:
    model, x, part = stored_model(), randn(9, COLUMNS, seed=7, scale=1.0).bfloat16(), product(8)
    plain = model["out"](x)
    padded = {"up": torch.cat([torch.zeros(16, 4), part["up"], torch.zeros(8, 4)]), "down": part["down"]}
    patched(model, Applied(lora("lora", part, [Rows("out.weight", 16, 24)])))
    changed = model["out"](x)
    assert torch.equal(changed[:, :16], plain[:, :16]) and torch.equal(changed[:, 24:], plain[:, 24:])
    torch.testing.assert_close(changed, by_peft(stored_model()["out"], (padded, 4.0, 1.0))(x), rtol=2**-8, atol=0.0)  # type: ignore[arg-type]
    assert not torch.equal(changed[:, 16:24], plain[:, 16:24])


CORE = {"up": randn(24, 4, 1, 1, seed=1), "down": randn(4, 48, 1, 1, seed=2), "mid": randn(4, 4, 1, 1, seed=3)}
HALVES = {"w1_a": (24, 4), "w1_b": (4, 48), "w2_a": (24, 4), "w2_b": (4, 48)}
CASES: dict[str, tuple[str, dict[str, Tensor]]] = {
    "lora": ("lora", product(24)),
    "tucker": ("lora", CORE),
    "dora by rows": ("lora", product(24) | {"dora_scale": randn(24, 1, seed=3)}),
    "dora by columns": ("lora", product(24) | {"dora_scale": randn(1, 48, seed=3)}),
    "peft's dora": ("lora", product(24) | {"magnitude": randn(24, seed=3)}),
    "loha": ("loha", {role: randn(*shape, seed=i) for i, (role, shape) in enumerate(HALVES.items())}),
    "lokr": ("lokr", {"w1": randn(4, 6, seed=1), "w2": randn(6, 8, seed=2)}),
    "glora": (
        "glora",
        {
            "a1": randn(48, 4, seed=1),
            "a2": randn(4, 48, seed=2),
            "b1": randn(24, 4, seed=3),
            "b2": randn(4, 48, seed=4),
        },
    ),
    "oft": ("oft", {"blocks": randn(4, 6, 6, seed=1)}),
    "oft, one block": ("oft", {"blocks": randn(1, 24, 24, seed=1)}),
    "boft": ("boft", {"blocks": randn(2, 6, 4, 4, seed=1)}),
    "diff": ("diff", {"diff": randn(24, 48, seed=1).bfloat16()}),
    "set": ("set", {"value": randn(24, 48, seed=1)}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_algorithm_gives_what_merging_into_the_numbers_gives(case: str) -> None:
    """What is no plain product bit for bit; products within the rounding of bfloat16, of weights and of results."""
    model, x = stored_model(), randn(9, COLUMNS, seed=7, scale=1.0).bfloat16()
    numbers, applied = with_numbers(model), Applied(lora(*CASES[case], whole("k"), 2.0), 0.8)
    plain = model["k"](x)
    patched(numbers, applied)
    expected, merged = numbers["k"](x), numbers["k"].weight
    patched(model, applied, beside=False)
    assert torch.equal(model["k"](x), expected) and torch.equal(model["k"].weight.dense(), merged)
    assert not torch.equal(plain, expected)
    model = stored_model()
    patched(model, applied)
    if case != "lora":
        assert torch.equal(model["k"](x), expected) and torch.equal(model["k"].weight.dense(), merged)
        return
    up, down = (tensor.abs() for tensor in CASES[case][1].values())
    sizes = merged.float().abs() + 0.8 * 2.0 / 4 * (up @ down)
    assert_within(model["k"].weight.dense(), merged, sizes)
    assert_within(model["k"](x), expected, x.float().abs() @ sizes.T + expected.float().abs())


def assert_within(found: Tensor, expected: Tensor, sizes: Tensor) -> None:
    """Equal within one unit in the last place of bfloat16 of these magnitudes: what both round to it twice."""
    assert bool(((found.float() - expected.float()).abs() <= 2**-7 * sizes).all())


def test_what_joins_layers_and_is_no_product_changes_each_as_merging_does() -> None:
    """Also a product of one of them, before a decomposition of all."""
    model, x = stored_model(), randn(9, COLUMNS, seed=7, scale=1.0).bfloat16()
    numbers = with_numbers(model)
    applied = [
        Applied(lora("lora", product(24), whole("v")), 0.8),
        Applied(lora("lora", product(72, seed=90) | {"dora_scale": randn(1, 48, seed=3)}, whole("q", "k", "v")), 0.5),
        Applied(lora("lora", product(32), whole("out")), 0.5, strength_model=0.9),
    ]
    patched(model, *applied)
    patched(numbers, *applied)
    for name in ROWS:
        assert torch.equal(model[name](x), numbers[name](x)), name


def test_a_plain_weight_that_is_joined_with_stored_ones_is_merged() -> None:
    model, x = stored_model(), randn(9, COLUMNS, seed=7, scale=1.0).bfloat16()
    numbers = with_numbers(model)
    model["q"] = with_numbers(model)["q"]
    applied = Applied(lora("lokr", {"w1": randn(4, 6, seed=1), "w2": randn(18, 8, seed=2)}, whole("q", "k", "v")))
    held = patched(model, applied)
    patched(numbers, applied)
    assert [type(model[n].weight.data) for n in "qk"] == [Tensor, StoredWeight]
    for name in "qkv":
        assert torch.equal(model[name](x), numbers[name](x))
    held.apply(())
    assert torch.equal(model["q"].weight, with_numbers(stored_model())["q"].weight)


def test_a_changed_strength_reads_nothing_and_merges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the LoRA was read from its file anew."""
    model, x = stored_model(), randn(9, COLUMNS, seed=7, scale=1.0).bfloat16()
    ink, kron = product(24), CASES["lokr"][1]

    def loras(strength: float) -> list[Applied]:
        named = [lora("lora", ink, whole("q"), 2.0), lora("lokr", kron, whole("k"))]
        return [Applied(made, strength) for made in named]

    held = patched(model, *loras(0.5))
    weakly = {name: model[name](x) for name in "qk"}

    def unwanted(*_: object) -> None:
        raise AssertionError("read or merged")

    with monkeypatch.context() as watched:
        for place, name in ((device_tensors, "check_finite"), (apply, "merge"), (stored_changes, "merge")):
            watched.setattr(place, name, unwanted)
        held.apply(loras(1.0))
    for name, made in zip("qk", loras(1.0), strict=True):
        fresh = stored_model()
        patched(fresh, made)
        assert torch.equal(model[name](x), fresh[name](x)) and not torch.equal(model[name](x), weakly[name])


def test_what_is_taken_off_leaves_the_very_weight_that_was_there() -> None:
    model = stored_model()
    before = {name: model[name].weight for name in ROWS}
    held = patched(model, Applied(lora("lora", product(72), whole("q", "k", "v"))))
    assert held.base == {f"{n}.weight": before[n] for n in "qkv"} and not held.merged_on_device
    for name in "qkv":
        now = model[name].weight
        assert isinstance(now, StoredWeight) and now.parts["codes"] is before[name].parts["codes"]
        assert now.nbytes == before[name].nbytes == 24 * (COLUMNS + 4)
    held.apply(())
    assert all(model[name].weight is before[name] for name in ROWS) and not held.base


def test_values_that_are_not_finite_are_refused() -> None:
    bad = product(24)
    bad["up"][3, 1] = float("nan")
    with pytest.raises(LoraError, match=r"up for q\.weight holds values that are not finite"):
        patched(stored_model(), Applied(lora("lora", bad, whole("q"))))


def test_a_stored_weight_is_not_changed_in_place() -> None:
    """Its numbers are made for the moment: the change would be lost."""
    layer = stored_layer(24, torch.bfloat16)
    with pytest.raises(UnsupportedInput, match=r"add_.* would change a weight that is stored as test-eight/I8"):
        layer.weight += 1.0


def peak(lora: Lora, strength_model: float) -> int:
    """Bytes that a layer with it needs for the moment, as torch's allocator counts them."""
    model, x = stored_model(), randn(1, COLUMNS, seed=7).bfloat16()
    patched(model, Applied(lora, 0.8, strength_model))
    model["k"](x)
    with profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as seen:
        model["k"](x)
    held = most = 0
    events = [*seen.profiler.kineto_results.experimental_event_tree()]  # type: ignore[union-attr]
    sizes = []
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
    for _, size in sorted(sizes, key=lambda item: item[0]):
        held += size
        most = max(most, held)
    return most


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_what_merging_takes_for_the_moment_is_known(case: str, joined: bool) -> None:
    algorithm, tensors = CASES[case]
    spec = {f"{name}.weight": ParameterSpec((rows, COLUMNS), "", (), BlockSpan(0, 1), 1) for name, rows in ROWS.items()}
    target: Sequence[Rows] = whole("k")
    if joined:
        target = [Rows("q.weight", 0, 12), Rows("k.weight", 12, 24)]
    made, small = lora(algorithm, tensors, target, 2.0), 2048
    known = transient_of(work_of([Applied(made, 0.8, 0.9)], frozenset(NAMES)), spec, beside=True)
    assert peak(made, 0.9) <= known + small
