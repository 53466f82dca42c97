"""Models with the same weights that compute with them differently: each is served as what it is."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel

from mesh_core.builtin import load_plugins
from mesh_core.errors import CheckpointMismatch
from mesh_core.model import TensorInfo, fingerprint
from mesh_flux2.config import INVISIBLE, config_from_shapes
from tests.adapters import tiny
from tests.support.splitting import checkpoint_at, split
from tests.support.workers import thread_workers

SHOWN = {
    "patch_size", "in_channels", "out_channels", "num_layers", "num_single_layers", "attention_head_dim",
    "num_attention_heads", "joint_attention_dim", "timestep_guidance_channels", "mlp_ratio", "guidance_embeds",
}  # fmt: skip
"""Arguments of FLUX.2's class that the names and shapes of parameters show."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``plain``, and ``other`` with the same weights and another configuration."""
    folder = tmp_path_factory.mktemp("models")
    tiny.saved(folder / "plain")
    shutil.copytree(folder / "plain", folder / "other")
    config = json.loads((folder / "other" / "config.json").read_text())
    (folder / "other" / "config.json").write_text(json.dumps({**config, "rope_theta": 100, "eps": 1e-2}))
    return folder


def test_every_argument_of_the_class_is_part_of_what_both_ends_have_in_common() -> None:
    given = set(inspect.signature(Flux2Transformer2DModel.__init__).parameters) - {"self"}
    assert given == SHOWN | set(INVISIBLE)


def test_one_worker_computes_each_as_the_whole_model_does(folder: Path) -> None:
    plugins, inputs = load_plugins(), tiny.inputs(guidance=False)
    results = []
    with thread_workers(folder, 1, "inproc", plugins=plugins) as workers:
        for name in ("plain", "other", "plain"):
            with split(folder / name, ":0", workers, plugins) as run:
                results.append(run(inputs))
            with torch.no_grad():
                whole = Flux2Transformer2DModel.from_pretrained(folder / name)(**inputs, return_dict=False)[0]
            assert torch.equal(results[-1], whole), name
    assert not torch.equal(results[0], results[1])


def test_one_worker_serves_both_at_once(folder: Path) -> None:
    plugins, inputs = load_plugins(), tiny.inputs(guidance=False)
    with thread_workers(folder, 1, "inproc", plugins=plugins) as workers:
        with (
            split(folder / "plain", ":0", workers, plugins) as plain,
            split(folder / "other", ":0", workers, plugins) as other,
        ):
            for _ in range(2):
                for name, run in (("other", other), ("plain", plain)):
                    with torch.no_grad():
                        whole = Flux2Transformer2DModel.from_pretrained(folder / name)(**inputs, return_dict=False)[0]
                    assert torch.equal(run(inputs), whole), name


def test_a_worker_with_another_configuration_is_refused(folder: Path, tmp_path: Path) -> None:
    plugins = load_plugins()
    with thread_workers(folder / "other", 1, "inproc", plugins=plugins) as workers:
        with pytest.raises(CheckpointMismatch), split(folder / "plain", ":1", workers, plugins):
            pass


def test_a_single_file_is_the_model_that_its_folder_is(folder: Path, tmp_path: Path) -> None:
    model = Flux2Transformer2DModel.from_pretrained(folder / "plain")
    tiny.save_single_file(model, tmp_path / "klein.safetensors")
    plugins = load_plugins()
    there, here = (checkpoint_at(p, plugins) for p in (folder / "plain", tmp_path / "klein.safetensors"))
    assert fingerprint.structure(there.spec) == fingerprint.structure(here.spec)
    assert fingerprint.of_checkpoint(there.header, there.spec) == fingerprint.of_checkpoint(here.header, here.spec)


def test_a_single_file_of_the_published_width_has_the_published_arguments(tmp_path: Path) -> None:
    """No file says them: they are those that the class has by itself, which every published config.json repeats."""
    with torch.device("meta"):
        model = Flux2Transformer2DModel(num_layers=1, num_single_layers=1)
    file = tmp_path / "single.safetensors"
    tensors = {n: TensorInfo(n, "BF16", tuple(p.shape), file, 0, 0) for n, p in model.named_parameters()}
    found = config_from_shapes(tensors, "", False)
    assert {name: found[name] for name in INVISIBLE} == {name: model.config[name] for name in INVISIBLE}
