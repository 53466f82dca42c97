"""Every public method of a pipeline and of its transformer: a split one does what a whole one does, or refuses by name.

The tables are held against the classes: a method that a new diffusers or PyTorch brings belongs into one of them. Those
of LoRAs have tables of their own in test_methods_lora.py; what a pipeline class defines itself are parts of its call.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from torch import nn

import mesh_core
from mesh_core.errors import MeshError
from mesh_core.programs.split_model import SplitModel
from tests.support import pipelines
from tests.support.split_klein import SplitKlein, run_split

Call = Callable[[Any], Any]

CPU = torch.device("cpu")


def read(name: str, *arguments: Any) -> Call:
    """Get an attribute, or call a method with ``arguments``."""

    def call(of: Any) -> Any:
        value = getattr(of, name)
        return value(*arguments) if callable(value) and not isinstance(value, type) else value

    return call


def written(name: str, place: str = "") -> Call:
    """What a method writes into a folder, or the file ``place`` of it."""

    def call(of: Any, folder: Path) -> Any:
        getattr(of, name)(folder / place)
        files = {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        for p in files:
            (folder / p).unlink()
        return files

    call.needs_folder = True  # type: ignore[attr-defined]
    return call


def in_context(name: str, *arguments: Any) -> Call:
    def call(of: Any) -> None:
        with getattr(of, name)(*arguments):
            pass

    return call


# What is asked of a transformer, without changing it.
ASKED: dict[str, Call] = {
    name: read(name)
    for name in (
        "T_destination", "attn_processors", "buffers", "call_super_init", "children", "config", "config_name", "device",
        "dtype", "dump_patches", "extra_repr", "get_extra_state", "get_memory_footprint", "has_compatibles",
        "ignore_for_config", "is_cache_enabled", "is_gradient_checkpointing", "modules", "named_buffers",
        "named_children", "named_modules", "named_parameters", "num_parameters", "parameters", "state_dict",
        "to_json_string",
    )
} | {
    "get_buffer": read("get_buffer", "proj_out.weight"),
    "get_parameter": read("get_parameter", "proj_out.weight"),
    "get_submodule": read("get_submodule", "single_transformer_blocks.1.attn"),
}  # fmt: skip

# What is done to a transformer.
DONE: dict[str, Call] = {
    name: read(name)
    for name in (
        "bfloat16", "compile_repeated_blocks", "cpu", "cuda", "dequantize", "disable_cache",
        "disable_gradient_checkpointing", "disable_npu_flash_attention", "disable_xformers_memory_efficient_attention",
        "disable_xla_flash_attention", "enable_npu_flash_attention", "enable_xformers_memory_efficient_attention",
        "enable_xla_flash_attention", "eval", "ipu", "mtia", "requires_grad_", "reset_attention_backend",
        "share_memory", "train", "unfuse_qkv_projections", "xpu", "zero_grad",
    )
} | {
    "cache_context": in_context("cache_context", "cond"),
    "compile": lambda m: m.compile(backend="eager"),
    "compile_repeated_blocks": lambda m: m.compile_repeated_blocks(backend="eager"),
    "forward": lambda m: m.forward.__name__,
    "register_backward_hook": read("register_backward_hook", lambda *args: None),
    "register_forward_hook": read("register_forward_hook", lambda module, args, output: (output[0] * 0.5,)),
    "register_forward_pre_hook": lambda m: m.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"timestep": kwargs["timestep"] * 0.9}), with_kwargs=True
    ),
    "register_full_backward_hook": read("register_full_backward_hook", lambda *args: None),
    "register_full_backward_pre_hook": read("register_full_backward_pre_hook", lambda *args: None),
    "register_load_state_dict_post_hook": read("register_load_state_dict_post_hook", lambda *args: None),
    "register_load_state_dict_pre_hook": read("register_load_state_dict_pre_hook", lambda *args: None),
    "register_state_dict_post_hook": read("register_state_dict_post_hook", lambda *args: None),
    "register_state_dict_pre_hook": read("register_state_dict_pre_hook", lambda *args: None),
    "save_config": written("save_config"),
    "save_pretrained": written("save_pretrained"),
    "set_attention_backend": read("set_attention_backend", "native"),
    "set_use_memory_efficient_attention_xformers": read("set_use_memory_efficient_attention_xformers", False),
    "set_use_npu_flash_attention": read("set_use_npu_flash_attention", True),
    "set_use_xla_flash_attention": read("set_use_xla_flash_attention", True),
    "to": read("to", "cpu", torch.bfloat16),
    "to_json_file": written("to_json_file", "config.json"),
    "type": read("type", torch.bfloat16),
}  # fmt: skip

REFUSED: dict[str, Call] = {
    "add_module": read("add_module", "another", nn.Identity()),
    "apply": read("apply", lambda module: None),
    "double": read("double"),
    "enable_cache": read("enable_cache", FirstBlockCacheConfig(threshold=0.1)),
    "enable_gradient_checkpointing": read("enable_gradient_checkpointing"),
    "enable_group_offload": read("enable_group_offload", CPU, CPU, "leaf_level"),
    "enable_layerwise_casting": read("enable_layerwise_casting", torch.float8_e4m3fn, torch.bfloat16),
    "enable_parallelism": read("enable_parallelism"),
    "float": read("float"),
    "fuse_qkv_projections": read("fuse_qkv_projections"),
    "half": read("half"),
    "load_state_dict": read("load_state_dict", {}),
    "register_buffer": read("register_buffer", "another", torch.zeros(1)),
    "register_module": read("register_module", "another", nn.Identity()),
    "register_parameter": read("register_parameter", "another", nn.Parameter(torch.zeros(1))),
    "set_attn_processor": lambda m: m.set_attn_processor(next(iter(m.attn_processors.values()))),
    "set_extra_state": read("set_extra_state", {}),
    "set_submodule": read("set_submodule", "proj_out", nn.Identity()),
    "to_empty": lambda m: m.to_empty(device="cpu"),
}

OF_THE_CLASS = {
    "extract_init_dict", "from_config", "from_pretrained", "from_single_file", "get_config_dict", "load_config",
    "register_for_auto_class",
}  # fmt: skip
"""Methods that know no object: they make others."""

UNTRIED = {"push_to_hub", "register_to_config"}
"""The first needs the network and is `save_pretrained` otherwise; the second is diffusers' own way to keep a config."""

# The same of a pipeline.
PIPELINE_ASKED: dict[str, Call] = {
    name: read(name)
    for name in (
        "components", "config", "config_name", "device", "dtype", "has_compatibles", "hf_device_map",
        "ignore_for_config", "name_or_path", "parameters", "progress_bar", "to_json_string",
    )
} | {"numpy_to_pil": lambda p: [i.size for i in p.numpy_to_pil(torch.zeros(1, 8, 8, 3).numpy())]}  # fmt: skip

PIPELINE_DONE: dict[str, Call] = {
    name: read(name)
    for name in (
        "disable_attention_slicing", "disable_xformers_memory_efficient_attention", "enable_attention_slicing",
        "enable_xformers_memory_efficient_attention", "maybe_free_model_hooks", "remove_all_hooks", "reset_device_map",
    )
} | {
    "enable_model_cpu_offload": lambda p: p.enable_model_cpu_offload(device="cpu"),
    "from_pipe": lambda p: pipelines.run(Flux2KleinPipeline.from_pipe(p, dtype=torch.bfloat16)),
    "register_modules": lambda p: p.register_modules(transformer=p.transformer),
    "save_config": written("save_config"),
    "save_pretrained": written("save_pretrained"),
    "set_attention_slice": read("set_attention_slice", 1),
    "set_progress_bar_config": lambda p: p.set_progress_bar_config(disable=True),
    "set_use_memory_efficient_attention_xformers": read("set_use_memory_efficient_attention_xformers", False),
    "to": read("to", "cpu"),
    "to_json_file": written("to_json_file", "config.json"),
}  # fmt: skip

PIPELINE_REFUSED: dict[str, Call] = {
    "enable_group_offload": lambda p: p.enable_group_offload(onload_device=CPU, offload_type="leaf_level"),
    "enable_sequential_cpu_offload": lambda p: p.enable_sequential_cpu_offload(device="cpu"),
}

PIPELINE_OF_THE_CLASS = OF_THE_CLASS | {"download"}


def inherited(kind: type) -> set[str]:
    """Public names that a class has from classes that know nothing of LoRAs."""
    found = set()
    for name in (n for n in dir(kind) if not n.startswith("_")):
        owner = next((c for c in kind.__mro__ if name in vars(c)), type)
        # transformers puts a method of its own into PyTorch's class.
        foreign = getattr(vars(owner).get(name), "__module__", "").startswith("transformers")
        if owner is not kind and not foreign and "Lora" not in owner.__name__ and "Peft" not in owner.__name__:
            found.add(name)
    return found


@pytest.mark.parametrize("kind", [Flux2Transformer2DModel, LTX2VideoTransformer3DModel])
def test_every_method_of_a_transformer_is_in_a_table(kind: type) -> None:
    assert inherited(kind) | {"forward"} == {*ASKED, *DONE, *REFUSED, *OF_THE_CLASS, *UNTRIED}


@pytest.mark.parametrize("kind", [Flux2KleinPipeline, LTX2Pipeline])
def test_every_method_of_a_pipeline_is_in_a_table(kind: type) -> None:
    known = {*PIPELINE_ASKED, *PIPELINE_DONE, *PIPELINE_REFUSED, *PIPELINE_OF_THE_CLASS, *UNTRIED}
    assert inherited(kind) | {"from_single_file"} == known
    for name in PIPELINE_OF_THE_CLASS & inherited(kind):
        assert not inspect.isfunction(inspect.getattr_static(kind, name)), name


@pytest.fixture(scope="module")
def three(klein: SplitKlein) -> Iterator[tuple[Any, Any, Any]]:
    """A whole pipeline, the same split, and one that never was whole."""
    pipes = klein.whole(), klein.split(klein.whole()), klein.load()
    yield pipes
    mesh_core.unsplit(pipes[1])
    pipes[2].transformer.mesh.close()


def plain(value: Any, of: Any) -> Any:
    """``value`` in a form that is equal for equal things of two pipelines."""
    if isinstance(value, torch.Tensor):
        return "a tensor", value.dtype, value.shape
    if isinstance(value, nn.Module):
        return "a module", type(value).__name__
    if value is of:
        return "itself"
    if isinstance(value, dict):
        return {k: plain(v, of) for k, v in value.items()}
    if isinstance(value, (list, tuple)) or inspect.isgenerator(value):
        return [plain(v, of) for v in value]
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.device, torch.dtype, type)):
        return value
    return type(value).__name__


def outcome(call: Call, of: Any, folder: Path) -> Any:
    """What a call gives, or which of diffusers' and PyTorch's own errors it ends in."""
    try:
        return plain(call(of, folder) if hasattr(call, "needs_folder") else call(of), of)  # type: ignore[call-arg]
    except MeshError:
        raise
    except Exception as error:
        return "raised", type(error).__name__


@pytest.mark.parametrize("name", ASKED)
def test_a_split_transformer_answers_as_a_whole_one(three: tuple[Any, Any, Any], name: str, tmp_path: Path) -> None:
    whole, split, loaded = (outcome(ASKED[name], pipe.transformer, tmp_path) for pipe in three)
    assert split == whole
    assert loaded == whole


@pytest.mark.parametrize("name", PIPELINE_ASKED)
def test_a_split_pipeline_answers_as_a_whole_one(three: tuple[Any, Any, Any], name: str, tmp_path: Path) -> None:
    whole, split, _ = (outcome(PIPELINE_ASKED[name], pipe, tmp_path) for pipe in three)
    assert split == whole


def calls(of_transformers: dict[str, Call], of_pipelines: dict[str, Call]) -> list[Any]:
    transformers = [(lambda pipe: pipe.transformer, call, f"transformer.{n}") for n, call in of_transformers.items()]
    pipes = [(lambda pipe: pipe, call, f"pipeline.{n}") for n, call in of_pipelines.items()]
    return [pytest.param(part, call, id=name) for part, call, name in transformers + pipes]


@pytest.mark.parametrize(("part", "call"), calls(DONE, PIPELINE_DONE))
def test_what_works_does_the_same_to_a_split_one(
    klein: SplitKlein, part: Callable[[Any], Any], call: Call, tmp_path: Path
) -> None:
    whole, pipe = klein.whole(), klein.split(klein.whole())
    assert outcome(call, part(pipe), tmp_path) == outcome(call, part(whole), tmp_path)
    picture = outcome(pipelines.run, whole, tmp_path)
    assert outcome(run_split, pipe, tmp_path) == picture
    if picture[0] != "raised":
        assert torch.equal(run_split(pipe), pipelines.run(whole))
    mesh_core.unsplit(pipe)
    torch._dynamo.reset()


@pytest.mark.parametrize(("part", "call"), calls(REFUSED, PIPELINE_REFUSED))
def test_what_cannot_work_is_refused_by_name_and_changes_nothing(
    klein: SplitKlein, expected: torch.Tensor, part: Callable[[Any], Any], call: Call
) -> None:
    pipe = klein.split(klein.whole())
    with pytest.raises(MeshError) as told:
        call(part(pipe))
    assert told.value.hint
    assert torch.equal(run_split(pipe), expected)
    mesh_core.unsplit(pipe)
    assert torch.equal(pipelines.run(pipe), expected)


COPIES: dict[str, Call] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda of: torch.save(of, io.BytesIO()),
}


@pytest.mark.parametrize("way", COPIES)
def test_a_split_transformer_is_not_copied(klein: SplitKlein, expected: torch.Tensor, way: str) -> None:
    pipe = klein.split(klein.whole())
    for of in (pipe.transformer, {"pipe": pipe.transformer}):
        if way == "copy" and isinstance(of, dict):
            continue
        with pytest.raises(MeshError, match="copied or pickled") as told:
            COPIES[way](of)
        assert "unsplit()" in told.value.hint
    assert torch.equal(run_split(pipe), expected)
    mesh_core.unsplit(pipe)
    copied = copy.deepcopy(pipe.transformer)
    assert not isinstance(copied, SplitModel)


@pytest.mark.parametrize("how", ["split", "loaded"])
def test_all_weights_of_a_split_model_are_given_and_saved(
    klein: SplitKlein, expected: torch.Tensor, tmp_path: Path, how: str
) -> None:
    weights = klein.whole().transformer.state_dict()
    pipe = klein.split(klein.whole()) if how == "split" else klein.load()
    for prefix, given in (
        ("", pipe.transformer.state_dict()),
        ("model.", pipe.transformer.state_dict(prefix="model.")),
    ):
        assert given.keys() == {prefix + name for name in weights}
        assert all(torch.equal(given[prefix + name], weight) for name, weight in weights.items())
    pipe.save_pretrained(tmp_path / "copy")
    assert torch.equal(run_split(pipe), expected)
    assert torch.equal(
        pipelines.run(Flux2KleinPipeline.from_pretrained(tmp_path / "copy", dtype=torch.bfloat16)), expected
    )
    mesh_core.unsplit(pipe)


def test_the_class_of_a_split_model_makes_whole_ones(klein: SplitKlein) -> None:
    pipe = klein.split(klein.whole())
    kind = type(pipe.transformer)
    for make in (
        partial(kind.from_config, pipe.transformer.config),
        partial(kind.from_pretrained, klein.folder / "klein" / "transformer"),
    ):
        assert type(make()) is Flux2Transformer2DModel
    mesh_core.unsplit(pipe)
