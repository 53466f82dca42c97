"""What replaces a transformer's forward() before or after the split: offloading works, the rest is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading, apply_layerwise_casting
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor

import mesh_core
from mesh_core.errors import CheckpointUnrecognised, MeshError, UnsupportedInput
from tests.support import pipelines
from tests.support.split_klein import SplitKlein, run_split

CPU = torch.device("cpu")


def same(picture: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(picture, expected)


def test_offloaded_then_split(klein: SplitKlein, expected: torch.Tensor) -> None:
    pipe = klein.whole()
    pipe.enable_model_cpu_offload(device="cpu")
    same(pipelines.run(pipe), expected)
    klein.split(pipe)
    same(run_split(pipe), expected)
    klein.split(pipe, ":1")
    same(run_split(pipe), expected)
    mesh_core.unsplit(pipe)
    same(pipelines.run(pipe), expected)
    pipe.remove_all_hooks()
    klein.split(pipe)
    same(run_split(pipe), expected)
    mesh_core.unsplit(pipe)


@pytest.mark.parametrize("how", ["split", "loaded"])
def test_split_then_offloaded(klein: SplitKlein, expected: torch.Tensor, how: str) -> None:
    pipe = klein.split(klein.whole()) if how == "split" else klein.load()
    pipe.enable_model_cpu_offload(device="cpu")
    same(run_split(pipe), expected)
    klein.split(pipe, ":3")
    same(run_split(pipe), expected)
    mesh_core.unsplit(pipe)
    same(pipelines.run(pipe), expected)
    klein.split(pipe)
    same(run_split(pipe), expected)
    pipe.remove_all_hooks()
    same(run_split(pipe), expected)
    mesh_core.unsplit(pipe)
    same(pipelines.run(pipe), expected)


class Nothing(ModelHook):
    """A hook of diffusers that changes nothing."""


def patched(model: Any) -> None:
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def patched_method(model: Any) -> None:
    forward = type(model).forward
    model.forward = MethodType(lambda self, *args, **kwargs: forward(self, *args, **kwargs), model)


def patched_and_offloaded(model: Any) -> None:
    from accelerate import cpu_offload_with_hook

    patched(model)
    cpu_offload_with_hook(model, CPU)


def swapped_norm(model: Any) -> None:
    model.single_transformer_blocks[1].norm = torch.nn.LayerNorm(32, elementwise_affine=False)
    model.single_transformer_blocks[1].norm.__class__ = type("OtherNorm", (torch.nn.LayerNorm,), {})


BEFORE: dict[str, tuple[Callable[[Any], object], str]] = {
    "group offloading": (
        lambda m: apply_group_offloading(m, onload_device=CPU, offload_device=CPU, offload_type="leaf_level"),
        "group_offloading",
    ),
    "layerwise casting": (
        lambda m: apply_layerwise_casting(m, storage_dtype=torch.float16, compute_dtype=torch.bfloat16),
        "layerwise_casting",
    ),
    "a cache": (lambda m: m.enable_cache(FirstBlockCacheConfig(threshold=0.1)), "hook 'fbc"),
    "a patched forward": (patched, "another forward"),
    "a patched method": (patched_method, "another forward"),
    "a patched forward under an offloading hook": (patched_and_offloaded, "over another forward"),
    "a hook of diffusers": (
        lambda m: HookRegistry.check_if_exists_or_initialize(m).register_hook(Nothing(), "nothing"),
        "hook 'nothing'",
    ),
    "a hook of accelerate": (lambda m: add_hook_to_module(m, AlignDevicesHook()), "AlignDevicesHook"),
    "a block's forward": (lambda m: patched(m.single_transformer_blocks[2]), "single_transformer_blocks.2 has"),
    "a hook on a block": (
        lambda m: m.single_transformer_blocks[0].register_forward_hook(lambda *args: None),
        "hook of PyTorch",
    ),
    "a pre-hook deep inside": (
        lambda m: m.single_transformer_blocks[0].attn.to_out.register_forward_pre_hook(lambda *args: None),
        "attn.to_out has a hook",
    ),
    "a hook on what both use": (
        lambda m: m.pos_embed.register_forward_hook(lambda *args: None), "pos_embed has a hook",
    ),
    "another processor": (
        lambda m: m.single_transformer_blocks[0].attn.set_processor(Flux2KVAttnProcessor()),
        "Flux2KVAttnProcessor",
    ),
    "another module": (swapped_norm, "OtherNorm"),
}  # fmt: skip


@pytest.mark.parametrize("what", BEFORE)
def test_what_was_done_before_is_refused_by_name_and_nothing_changes(klein: SplitKlein, what: str) -> None:
    pipe = klein.whole()
    do, says = BEFORE[what]
    do(pipe.transformer)
    kind, devices = type(pipe.transformer), {n: p.device for n, p in pipe.transformer.named_parameters()}
    with pytest.raises((UnsupportedInput, CheckpointUnrecognised)) as told:
        klein.split(pipe)
    assert says in told.value.message and told.value.hint
    assert type(pipe.transformer) is kind
    assert {n: p.device for n, p in pipe.transformer.named_parameters()} == devices
    assert not any(worker.worker.sessions for worker in klein.workers)


def test_what_is_done_to_local_blocks_only_acts_as_on_the_whole_model(klein: SplitKlein) -> None:
    def brighter(module: Any, args: Any, output: Any) -> Any:
        return output[0] * 1.5, output[1]

    whole, pipe = klein.whole(), klein.whole()
    for each in (whole, pipe):
        each.transformer.transformer_blocks[0].register_forward_hook(brighter)
    klein.split(pipe)
    expected = pipelines.run(whole)
    same(run_split(pipe), expected)
    with pytest.raises(UnsupportedInput, match=r"transformer_blocks\.0 has a hook"):
        klein.split(pipe, ":0")
    same(run_split(pipe), expected)
    mesh_core.unsplit(pipe)


AFTER: dict[str, Callable[[Any], object]] = {
    "a hook": lambda m: m.single_transformer_blocks[0].register_forward_hook(lambda *args: None),
    "a pre-hook": lambda m: m.single_transformer_blocks[0].attn.register_forward_pre_hook(lambda *args: None),
    "a hook on an activation": lambda m: m.norm_out.silu.register_forward_hook(lambda *args: None),
    "a hook on what both use": lambda m: m.pos_embed.register_forward_hook(lambda *args: None),
    "a processor": lambda m: m.single_transformer_blocks[0].attn.set_processor(Flux2KVAttnProcessor()),
    "a forward": lambda m: patched(m.single_transformer_blocks[0]),
    "a module": lambda m: setattr(m, "proj_out", torch.nn.Linear(32, 4)),
    "a block": lambda m: m.single_transformer_blocks.__setitem__(0, torch.nn.Identity()),
    "a weight": lambda m: setattr(m.proj_out, "weight", torch.nn.Parameter(torch.zeros(1))),
    "layerwise casting": lambda m: apply_layerwise_casting(
        m.single_transformer_blocks, storage_dtype=torch.float16, compute_dtype=torch.bfloat16
    ),
    "group offloading": lambda m: apply_group_offloading(
        m.single_transformer_blocks[0], onload_device=CPU, offload_device=CPU, offload_type="leaf_level"
    ),
}


@pytest.mark.parametrize("what", AFTER)
def test_what_is_done_afterwards_to_remote_blocks_is_refused_when_it_is_done(
    klein: SplitKlein, expected: torch.Tensor, what: str
) -> None:
    pipe = klein.split(klein.whole())
    with pytest.raises(UnsupportedInput) as told:
        AFTER[what](pipe.transformer)
    assert "unsplit()" in told.value.hint
    same(run_split(pipe), expected)
    mesh_core.unsplit(pipe)
    same(pipelines.run(pipe), expected)


def test_a_forward_that_calls_blocks_itself_is_refused_at_the_first_remote_one(klein: SplitKlein) -> None:
    pipe = klein.split(klein.whole())
    original = type(pipe.transformer).__bases__[1].forward
    pipe.transformer.forward = MethodType(original, pipe.transformer)
    with pytest.raises(UnsupportedInput, match="was called here, and workers run it"):
        pipelines.run(pipe)
    del pipe.transformer.forward
    run_split(pipe)
    mesh_core.unsplit(pipe)


def test_a_cache_of_ones_own_over_the_whole_forward_works_when_it_is_put_on_afterwards(klein: SplitKlein) -> None:
    def every_other(model: Any) -> None:
        forward, kept = model.forward, []

        def call(*args: Any, **kwargs: Any) -> Any:
            if len(kept) % 2 == 0:
                kept.append(forward(*args, **kwargs))
                return kept[-1]
            kept.append(None)
            return kept[-2]

        model.forward = call

    whole, pipe = klein.whole(), klein.split(klein.whole())
    for each in (whole, pipe):
        every_other(each.transformer)
    assert torch.equal(pipelines.run(pipe, num_inference_steps=4), pipelines.run(whole, num_inference_steps=4))
    assert len(pipe.transformer.mesh.stats.steps) == 2
    mesh_core.unsplit(pipe)
    assert torch.equal(pipelines.run(pipe, num_inference_steps=4), pipelines.run(whole, num_inference_steps=4))


def test_hooks_on_the_whole_transformer_act_as_on_a_whole_one(klein: SplitKlein) -> None:
    whole, pipe = klein.whole(), klein.split(klein.whole())
    for each in (whole, pipe):
        each.transformer.register_forward_hook(lambda module, args, output: (output[0] * 0.5,))
    same(run_split(pipe), pipelines.run(whole))
    mesh_core.unsplit(pipe)


@pytest.mark.parametrize("method", ["enable_sequential_cpu_offload", "enable_group_offload"])
def test_offloading_piece_by_piece_is_refused_before_any_part_is_touched(
    klein: SplitKlein, expected: torch.Tensor, method: str
) -> None:
    pipe = klein.split(klein.whole())
    arguments = {"device": "cpu"} if "sequential" in method else {"onload_device": CPU, "offload_type": "leaf_level"}
    with pytest.raises(MeshError) as told:
        getattr(pipe, method)(**arguments)
    assert "enable_model_cpu_offload()" in told.value.hint
    assert not any(hasattr(m, "_hf_hook") or hasattr(m, "_diffusers_hook") for m in pipe.text_encoder.modules())
    same(run_split(pipe), expected)
    mesh_core.unsplit(pipe)
    getattr(pipe, method)(**arguments)
    if "group" in method:  # the other one needs an accelerator, on whole pipelines too
        same(pipelines.run(pipe), expected)


def test_the_other_parts_are_group_offloaded_beside_a_split_transformer(
    klein: SplitKlein, expected: torch.Tensor
) -> None:
    pipe = klein.split(klein.whole())
    pipe.enable_group_offload(onload_device=CPU, offload_type="leaf_level", exclude_modules="transformer")
    same(run_split(pipe), expected)
    mesh_core.unsplit(pipe)
