"""Each argument of diffusers' ``from_pretrained`` means what it says in `load_pipeline`, or is refused by name."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, PipelineQuantizationConfig

import mesh_core
from mesh_core.errors import CheckpointUnrecognised, ConfigError
from mesh_core.host.runner import place
from mesh_core.programs import diffusers as program
from mesh_core.programs.pipeline_arguments import PASSED, REFUSED
from tests.support import pipelines

WORKS: dict[str, Any] = {
    "dtype": "bfloat16",
    "torch_dtype": torch.bfloat16,
    "variant": None,
    "custom_pipeline": None,  # a test of its own
    "custom_revision": "main",
    "trust_remote_code": True,
    "local_files_only": True,
    "cache_dir": "elsewhere",
    "proxies": None,  # huggingface_hub warns that it ignores them
    "token": "x",
    "use_safetensors": True,
    "low_cpu_mem_usage": False,
    "disable_mmap": False,  # True leaves files open in diffusers
    "quantization_config": None,  # a test of its own
    "kwargs": None,  # components, in a test of their own
}
"""Arguments that `load_pipeline` takes, with a value each that changes no picture."""

REFUSED_WITH: dict[str, Any] = {
    "transformer": None,
    "subfolder": "pipeline",
    "revision": "main",
    "force_download": True,
    "mirror": "x",
    "dduf_file": "x.dduf",
    "device_map": "balanced",
    "max_memory": {0: "1GB"},
    "offload_folder": "x",
    "offload_state_dict": True,
    "output_loading_info": True,
    "load_connected_pipeline": True,
    "use_onnx": True,
    "use_flashpack": True,
    "provider": "CPUExecutionProvider",
    "provider_options": {},
    "sess_options": object(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "klein"
    pipelines.save(folder)
    return folder


def load(folder: Path, **arguments: Any) -> Any:
    return mesh_core.load_pipeline(folder, local=":", device="cpu", **arguments)


def test_every_argument_of_from_pretrained_works_or_is_refused() -> None:
    documented = re.findall(r"^ {12}(\w+) ?\(", inspect.getdoc(DiffusionPipeline.from_pretrained) or "", re.M)
    documented += re.findall(r"^\s{4}(\w+) ?\(", inspect.getdoc(DiffusionPipeline.from_pretrained) or "", re.M)
    taken = re.findall(r'kwargs\.pop\(\s*"(\w+)"', inspect.getsource(DiffusionPipeline.from_pretrained))
    own = {"pretrained_model_name_or_path"}
    assert len(documented) > 20 and len(taken) > 20
    assert {*documented, *taken} - own <= WORKS.keys() | REFUSED_WITH.keys()
    assert REFUSED_WITH.keys() == REFUSED.keys()
    assert {*PASSED} <= WORKS.keys()


def test_what_works_changes_no_picture(folder: Path) -> None:
    expected = pipelines.run(Flux2KleinPipeline.from_pretrained(folder, dtype=torch.bfloat16))
    given = {name: value for name, value in WORKS.items() if value is not None}
    assert torch.equal(pipelines.run(load(folder, **given)), expected)


@pytest.mark.parametrize("name", REFUSED_WITH)
def test_what_has_no_meaning_here_is_refused_by_name_before_anything_is_read(folder: Path, name: str) -> None:
    value = REFUSED_WITH[name] if REFUSED_WITH[name] is not None else torch.nn.Linear(1, 1)
    with pytest.raises(ConfigError, match=rf"\b{name}=") as told:
        load(folder, **{name: value})
    assert told.value.hint == REFUSED[name]
    load(folder, **{name: None})


def test_a_name_at_hugging_face_says_how_to_download_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointUnrecognised, match="not downloaded") as told:
        load(Path("black-forest-labs/FLUX.2-klein-4B"))
    assert "hf download black-forest-labs/FLUX.2-klein-4B" in told.value.hint


def test_pickles_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="use_safetensors=False"):
        load(folder, use_safetensors=False)


@pytest.mark.parametrize(("name", "meant"), [("varaint", "variant"), ("devcie", "device"), ("schedular", "scheduler")])
def test_a_misspelt_argument_is_named_with_what_it_may_mean(folder: Path, name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}'") as told:
        load(folder, **{name: "x"})
    assert told.value.hint == meant


def test_components_that_are_given_are_used(folder: Path) -> None:
    mine = FlowMatchEulerDiscreteScheduler(shift=2.0)
    pipeline = load(folder, scheduler=mine, is_distilled=False)
    assert pipeline.scheduler.config.shift == 2.0 and pipeline.config.is_distilled is False


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("written", ["float32", "torch.float32", torch.float32])
def test_a_type_is_understood_under_both_names(folder: Path, name: str, written: Any) -> None:
    pipeline = load(folder, **{name: written})
    assert pipeline.transformer.dtype == pipeline.vae.dtype == torch.float32


def test_a_type_for_each_component_is_as_in_diffusers(folder: Path) -> None:
    each: dict[str, Any] = {"transformer": torch.bfloat16, "vae": "float32", "default": torch.float16}
    pipeline = load(folder, dtype=each)
    types = [pipeline.transformer.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype]
    assert types == [torch.bfloat16, torch.float32, torch.float16]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"dtype": "bfloat"}, "no type of torch"),
        ({"dtype": "nn"}, "no type of torch"),
        ({"dtype": 16}, "no type of torch"),
        ({"torch_dtype": "float8_e4m3fn"}, "do not compute in it"),
        ({"dtype": torch.int8}, "do not compute in it"),
        ({"dtype": {"vae": "float"}, "torch_dtype": torch.float16}, "differ"),
        ({"dtype": {"default": "half", "vae": "x"}}, "no type of torch"),
    ],
    ids=str,
)
def test_what_is_no_type_is_said_before_a_worker_is_called(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(program, place.__name__, None)
    with pytest.raises(ConfigError, match=says):
        load(folder, **arguments)


def test_a_custom_pipeline_is_the_one_that_is_loaded(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").write_text(
        "from diffusers import Flux2KleinPipeline\n\n\nclass Mine(Flux2KleinPipeline):\n    pass\n"
    )
    pipeline = load(folder, custom_pipeline=str(tmp_path), trust_remote_code=True)
    assert type(pipeline).__name__ == "Mine"
    assert pipelines.run(pipeline).shape[-1] == pipelines.SIZE


@pytest.mark.parametrize("parts", [["transformer"], ["text_encoder", "transformer"], None], ids=str)
def test_quantising_the_transformer_is_refused(folder: Path, parts: list[str] | None) -> None:
    config = _config(parts)
    with pytest.raises(ConfigError, match="quantises the transformer") as told:
        load(folder, quantization_config=config)
    assert "text_encoder" in told.value.hint


def test_quantising_another_component_is_left_to_diffusers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    original = Flux2KleinPipeline.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(cls: type[Any], path: str, **given: Any) -> Any:
        seen.update(given)
        return original(cls, path, **{k: v for k, v in given.items() if k != "quantization_config"})

    monkeypatch.setattr(Flux2KleinPipeline, "from_pretrained", classmethod(from_pretrained))
    config = _config(["text_encoder"])
    load(folder, quantization_config=config)
    assert seen["quantization_config"] is config


def _config(parts: list[str] | None) -> Any:
    # What it names is all that is looked at; its backends are packages that are not installed here.
    config = PipelineQuantizationConfig.__new__(PipelineQuantizationConfig)
    config.quant_mapping, config.components_to_quantize = None, parts
    return config
