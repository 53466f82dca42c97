"""A model in every format, cut at every block over a real worker, computes bit for bit what it computes alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.quantise import nvfp4
from benchmarks.quantise.kinds import WRITERS
from benchmarks.quantise.original import original
from mesh_core.builtin import load_plugins
from mesh_core.model.library import Checkpoint
from mesh_core.plugins.registry import Plugins
from tests.adapters import tiny, tiny_ltx
from tests.support.splitting import checkpoint_at, split
from tests.support.workers import thread_workers

TRAINED = Path(__file__).parents[2] / "examples" / "tiny-klein" / "model"


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return load_plugins()


@pytest.fixture(scope="module")
def trained() -> tuple[Checkpoint, dict[str, Tensor]]:
    return original(TRAINED)


def klein_inputs(batch: int = 1, height: int = 4, width: int = 4) -> dict[str, Any]:
    """Arguments of the trained model's forward(), bfloat16."""
    made = tiny.inputs(guidance=False, batch=batch, height=height, width=width, dtype=torch.bfloat16)
    torch.manual_seed(2)
    made["hidden_states"] = torch.randn(batch, height * width, 128).bfloat16()
    made["encoder_hidden_states"] = torch.randn(batch, 7, 192).bfloat16()
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("stored")


def tensors_of(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def check(file: Path, inputs: Mapping[str, Any], plugins: Plugins, cuts: Sequence[int]) -> Checkpoint:
    """Whole and cut at each of ``cuts``, the model in ``file`` computes the same bits; returns its checkpoint."""
    with torch.no_grad():
        with split(file, ":", [], plugins, dtype=torch.bfloat16) as whole:
            expected = tensors_of(whole(inputs))
        assert all(bool(e.isfinite().all()) and float(e.abs().max()) > 0 for e in expected)
        with thread_workers(file, 1, plugins=plugins) as (worker,):
            for cut in cuts:
                with split(file, f":{cut}", [worker], plugins, dtype=torch.bfloat16) as run:
                    for e, f in zip(expected, tensors_of(run(inputs)), strict=True):
                        assert torch.equal(e, f), f"cut at {cut}: differs by up to {(e - f).abs().max().item():g}"
    return checkpoint_at(file, plugins)


ALIKE = {"Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K", "Q2_K"} | {
    "fp8-e5m2",
    "fp8-scaled-metadata",
    "fp8-scaled-old",
    "fp8-scaled-e5m2",
    "int8",
}
"""Kinds whose rows are cut as those of others of their format are: at some blocks only."""


@pytest.mark.parametrize("kind", WRITERS)
def test_a_trained_model_cut_at_every_block(
    kind: str, trained: tuple[Checkpoint, dict[str, Tensor]], folder: Path, plugins: Plugins
) -> None:
    file = WRITERS[kind](trained[1], folder / f"klein-{kind}", {})
    cuts = (0, 4, 9) if kind in ALIKE else range(trained[0].spec.blocks)
    found = check(file, klein_inputs(batch=2, height=4, width=6), plugins, cuts)
    stored = [p for p in found.spec.parameters.values() if p.stored_bytes is not None]
    held = sum(p.elements for p in stored)
    assert held > (0.5 if kind == "fp8-mixed" else 0.9) * sum(p.elements for p in found.spec.parameters.values())
    assert sum(p.stored_bytes or 0 for p in stored) < 1.1 * held


@pytest.mark.parametrize("kind", ["fp8-scaled", "nvfp4", "Q8_0"])
def test_flux2_and_ltx_too(kind: str, tmp_path: Path, plugins: Plugins) -> None:
    """Formats know no family, and families no format."""
    dev = tmp_path / "dev.safetensors"
    tiny.save_single_file(tiny.transformer(guidance=True, dtype=torch.bfloat16), dev)
    ltx = tmp_path / "ltx.safetensors"
    wide = {"attention_head_dim": 32, "audio_attention_head_dim": 32}
    wide |= {"cross_attention_dim": 64, "audio_cross_attention_dim": 64}
    tiny_ltx.save_single_file(tiny_ltx.transformer("2.0", dtype=torch.bfloat16, **wide), ltx)
    for file, inputs in (
        (dev, tiny.inputs(guidance=True, references=1, dtype=torch.bfloat16)),
        (ltx, tiny_ltx.inputs("2.0", batch=2, dtype=torch.bfloat16)),
    ):
        checkpoint, tensors = original(file)
        written = WRITERS[kind](tensors, tmp_path / f"{file.stem}-{kind}", checkpoint.header.metadata)
        found = check(written, inputs, plugins, range(checkpoint.spec.blocks))
        assert any(p.stored_bytes for p in found.spec.parameters.values())


def test_a_folder_in_nvfp4_as_diffusers_reads_it(folder: Path, plugins: Plugins) -> None:
    source, target = TRAINED / "transformer", folder / "nvfp4"
    (file,) = source.glob("*.safetensors")
    tensors = load_file(file)
    which = [name for name, t in tensors.items() if "blocks." in name and name.endswith(".weight") and t.dim() == 2]
    target.mkdir()
    save_file(nvfp4.quantise_for_diffusers(tensors, which), target / file.name)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | nvfp4.CONFIG))
    found = check(target, klein_inputs(), plugins, cuts=(0, 5))
    assert sum(p.dtype == "nvfp4/E2M1" for p in found.spec.parameters.values()) == len(which)
