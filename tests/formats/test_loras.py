"""LoRAs on models in the formats that people have: whole and cut, the bits of diffusers with PEFT where it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel, GGUFQuantizationConfig
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.quantise.fp8 import fp8_scaled
from benchmarks.quantise.gguf import write_gguf
from benchmarks.quantise.int8 import quantise as int8
from benchmarks.quantise.nvfp4 import quantise as nvfp4
from mesh_core.builtin import installed_plugins
from mesh_core.loras.lora import Applied
from mesh_core.loras.memory import NamedPatch, lora_from_patches
from mesh_core.loras.read import read_lora
from mesh_core.model.library import Checkpoint
from mesh_core.plugins.registry import Plugins
from tests.adapters import tiny
from tests.support import loras
from tests.support.splitting import checkpoint_at, split
from tests.support.workers import thread_workers


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return installed_plugins()


@pytest.fixture(scope="module")
def model() -> Flux2Transformer2DModel:
    """Wide enough for blocks of 256."""
    return tiny.transformer(
        guidance=False, num_attention_heads=8, joint_attention_dim=256, in_channels=16, dtype=torch.bfloat16
    )


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    given = tiny.inputs(guidance=False, dtype=torch.bfloat16)
    given["encoder_hidden_states"] = torch.randn(1, 7, 256, generator=torch.Generator().manual_seed(5)).bfloat16()
    return given


def in_blocks(name: str) -> bool:
    return "blocks." in name


def written(kind: str, model: Flux2Transformer2DModel, folder: Path) -> Path:
    """``model`` under its authors' names, with the matrices of its blocks in that format."""
    tensors = tiny.to_original(model)
    which = [name for name, tensor in tensors.items() if in_blocks(name) and tensor.dim() == 2]
    if kind.startswith("Q"):
        return write_gguf(folder / "klein.gguf", tensors, kind, keep=lambda name: not in_blocks(name))
    make: Any = {"fp8": fp8_scaled, "int8": int8, "nvfp4": nvfp4}[kind]
    made, metadata = make(tensors, which)
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, folder / "klein.safetensors", metadata)
    return folder / "klein.safetensors"


def lora_file(model: Flux2Transformer2DModel, checkpoint: Checkpoint, folder: Path) -> Path:
    """Of every layer of the blocks, in float32; all of them are stored."""
    shapes = {name: shape for name, shape in loras.modules(model).items() if in_blocks(name)}
    assert all(checkpoint.spec.parameters[f"{name}.weight"].stored_bytes is not None for name in shapes)
    return loras.save(folder / "ink.safetensors", loras.peft(shapes, rank=4))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_a_cut_gguf_model_is_diffusers_own_with_peft_bit_for_bit(
    kind: str, model: Flux2Transformer2DModel, inputs: dict[str, Any], plugins: Plugins, tmp_path: Path
) -> None:
    file = written(kind, model, tmp_path)
    model.save_config(tmp_path / "config")
    whole = Flux2Transformer2DModel.from_single_file(
        str(file),
        config=str(tmp_path / "config"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
        torch_dtype=torch.bfloat16,
    )
    lora = lora_file(model, checkpoint_at(file, plugins), tmp_path)
    whole.load_lora_adapter(loras.peft({n: s for n, s in loras.modules(model).items() if in_blocks(n)}, rank=4))
    expected: dict[float, Tensor] = {}
    for strength in (1.0, -0.7):
        whole.set_adapters(list(whole.peft_config), strength)
        with torch.no_grad():
            expected[strength] = whole(**inputs, return_dict=False)[0]
    assert not torch.equal(*expected.values())
    with thread_workers(file, 1, plugins=plugins) as (worker,):
        for cut in (":0", ":1", ":4", ":"):
            with split(file, cut, [worker] if cut != ":" else [], plugins, dtype=torch.bfloat16) as run:
                for strength, result in expected.items():
                    run.set_loras([Applied(read_lora(lora, run.checkpoint), strength)])
                    assert torch.equal(run(inputs), result), (cut, strength)


@pytest.mark.parametrize("kind", ["fp8", "int8", "nvfp4", "Q4_K"])
def test_products_and_other_kinds_cut_at_every_block(
    kind: str, model: Flux2Transformer2DModel, inputs: dict[str, Any], plugins: Plugins, tmp_path: Path
) -> None:
    file = written(kind, model, tmp_path)
    checkpoint = checkpoint_at(file, plugins)
    ink = read_lora(lora_file(model, checkpoint, tmp_path), checkpoint)
    joined = {"w1": loras.randn(8, 8, seed=1), "w2": loras.randn(96, 32, seed=2)}
    kron = lora_from_patches(checkpoint, [NamedPatch("double_blocks.1.img_attn.qkv.weight", "lokr", joined)], "kron")
    sets = [[Applied(ink, 0.6)], [Applied(ink, 0.6), Applied(kron, 0.3)], [Applied(kron, 0.3)], []]
    # Products in the type of the weights; what is merged with others, in its own.
    qkv = {f"transformer_blocks.1.attn.to_{letter}.weight" for letter in "qkv"}
    held = [ink.nbytes // 2, (ink.nbytes + ink.restricted(qkv).nbytes) // 2 + kron.nbytes, kron.nbytes, 0]
    with split(file, ":", [], plugins, dtype=torch.bfloat16) as whole:
        expected = []
        for used in sets:
            whole.set_loras(used)
            expected.append(whole(inputs))
    assert not any(torch.equal(expected[-1], other) for other in expected[:-1])
    with thread_workers(file, 1, plugins=plugins) as (worker,):
        for cut in range(checkpoint.spec.blocks):
            with split(file, f":{cut}", [worker], plugins, dtype=torch.bfloat16) as run:
                plain = worker.worker.stages.nbytes
                for used, size, result in zip(sets, held, expected, strict=True):
                    run.set_loras(used)
                    assert torch.equal(run(inputs), result), (cut, len(used))
                    if cut == 0:
                        assert worker.worker.stages.nbytes == plain + size
