"""The attention backend that a user chooses is the workers' too, so that lossless stays bit-exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

import mesh_core
from mesh_core.errors import UnsupportedInput
from mesh_core.model.attention import use_backend
from tests.adapters import tiny
from tests.support import pipelines
from tests.support.split_klein import SplitKlein, run_split

REGISTRY: Any = attention_dispatch._AttentionBackendRegistry


@pytest.fixture(autouse=True)
def _native_again() -> Iterator[None]:
    yield
    REGISTRY.set_active_backend(AttentionBackendName.NATIVE)


def of_the_model(pipe: Any, stack: ExitStack) -> None:
    pipe.transformer.set_attention_backend("_native_math")
    REGISTRY.set_active_backend(AttentionBackendName.NATIVE)


def of_a_context(pipe: Any, stack: ExitStack) -> None:
    stack.enter_context(attention_backend("_native_math"))


def of_the_process(pipe: Any, stack: ExitStack) -> None:
    REGISTRY.set_active_backend(AttentionBackendName._NATIVE_MATH)


@pytest.mark.parametrize("choose", [of_the_model, of_a_context, of_the_process])
@pytest.mark.parametrize("when", ["before", "after"])
def test_workers_compute_attention_as_the_whole_model_does(
    klein: SplitKlein, monkeypatch: pytest.MonkeyPatch, choose: Callable[[Any, ExitStack], None], when: str
) -> None:
    used: list[str] = []
    for name in (AttentionBackendName.NATIVE, AttentionBackendName._NATIVE_MATH):
        monkeypatch.setitem(REGISTRY._backends, name, noting(used, name.value, REGISTRY._backends[name]))
    whole, pipe = klein.whole(), klein.whole()
    native = pipelines.run(whole)
    with ExitStack() as stack:
        choose(whole, stack)
        expected = pipelines.run(whole)
        if when == "before":
            choose(pipe, stack)
        klein.split(pipe)
        if when == "after":
            run_split(pipe)
            choose(pipe, stack)
        used.clear()
        assert torch.equal(run_split(pipe), expected)
        # In each of two steps, each of two double and three single blocks.
        assert used == ["_native_math"] * 10
        assert REGISTRY._active_backend.value == ("native" if choose is of_the_model else "_native_math")
    REGISTRY.set_active_backend(AttentionBackendName.NATIVE)
    pipe.transformer.reset_attention_backend()
    used.clear()
    assert torch.equal(run_split(pipe), native)
    assert used == ["native"] * 10
    mesh_core.unsplit(pipe)


def noting(used: list[str], name: str, backend: Callable[..., Any]) -> Callable[..., Any]:
    def call(**kwargs: Any) -> Any:
        used.append(name)
        return backend(**kwargs)

    return call


def test_layers_that_differ_are_refused_at_the_next_step(klein: SplitKlein) -> None:
    pipe = klein.split(klein.whole())
    pipe.transformer.transformer_blocks[0].attn.processor._attention_backend = AttentionBackendName._NATIVE_MATH
    with pytest.raises(UnsupportedInput, match="_native_math, native") as told:
        pipelines.run(pipe)
    assert "set_attention_backend" in told.value.hint
    pipe.transformer.reset_attention_backend()
    run_split(pipe)
    mesh_core.unsplit(pipe)


@pytest.mark.parametrize(
    ("name", "why"),
    [("flash", "flash-attn"), ("_flash_3_hub", "would have to be downloaded"), ("telepathy", "telepathy")],
)
def test_a_backend_that_a_worker_cannot_use_is_refused_by_name(name: str, why: str) -> None:
    model = tiny.transformer(guidance=False)
    with pytest.raises(UnsupportedInput, match=why) as told:
        use_backend(model, name)
    assert "reset_attention_backend()" in told.value.hint
