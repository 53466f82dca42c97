"""LTX-2 and LTX-2.3, video with sound, at every cut; where the ComfyUI at hand knows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters import tiny_ltx
from tests.comfy import graphs
from tests.comfy.graphs import Graph, node
from tests.comfy.install import ComfyUI
from tests.comfy.server import Server
from tests.support.loras import randn
from tests.support.workers import ProcessWorker

NEAR = 4e-5
BLOCKS = 3
FILES = {"2.0": "tiny-ltx-2.0.safetensors", "2.3": "tiny-ltx-2.3.safetensors"}
WIDTHS: dict[str, tuple[int, int]] = {"2.0": (12, 12), "2.3": (32, 16)}
"""Of a text before the connectors of the video and the audio."""


@pytest.fixture(scope="module", autouse=True)
def files(comfy: ComfyUI, base: Path) -> None:
    """Both generations as single files, with the connectors that run before the model itself."""
    if not (comfy.folder / "comfy" / "ldm" / "lightricks" / "av_model.py").exists():
        pytest.skip("this ComfyUI does not know LTX-2")
    for generation, name in FILES.items():
        _write(generation, base / "models" / "diffusion_models" / name)


def _write(generation: Any, to: Path) -> None:
    channels = dict.fromkeys(("in_channels", "out_channels", "audio_in_channels", "audio_out_channels"), 128)
    model = tiny_ltx.transformer(generation, blocks=BLOCKS, dtype=torch.bfloat16, **channels)
    tensors = {f"model.diffusion_model.{name}": t for name, t in tiny_ltx.to_original(model).items()}
    for connector, width in zip(("video", "audio"), WIDTHS[generation], strict=True):
        for name, tensor in _connector(width, gated=generation == "2.3").items():
            tensors[f"model.diffusion_model.{connector}_embeddings_connector.{name}"] = tensor
    heads = {"connector_num_attention_heads": 2, "audio_connector_num_attention_heads": 2}
    heads["connector_attention_head_dim"] = WIDTHS[generation][0] // 2
    heads["audio_connector_attention_head_dim"] = WIDTHS[generation][1] // 2
    newer = {
        "caption_proj_before_connector": True,
        "caption_projection_first_linear": False,
        "connector_apply_gated_attention": True,
    }
    config = {**tiny_ltx.original_config(model), **heads, "connector_num_layers": 1}
    config |= newer if generation == "2.3" else {}
    tiny_ltx.save_tensors(tensors, to, config)


def _connector(width: int, *, gated: bool) -> dict[str, torch.Tensor]:
    """One block, as ComfyUI's ``Embeddings1DConnector`` names it, and 128 registers."""
    block = "transformer_1d_blocks.0."
    shapes = {f"attn1.to_{name}": (width, width) for name in ("q", "k", "v", "out.0")}
    shapes |= {"ff.net.0.proj": (4 * width, width), "ff.net.2": (width, 4 * width)}
    shapes |= {"attn1.to_gate_logits": (2, width)} if gated else {}
    made = {"learnable_registers": randn(128, width, seed=1)}
    for seed, (name, shape) in enumerate(shapes.items()):
        made[f"{block}{name}.weight"] = randn(*shape, seed=seed, scale=0.1)
        made[f"{block}{name}.bias"] = randn(shape[0], seed=seed + 40, scale=0.1)
    for name in ("q_norm", "k_norm"):
        made[f"{block}attn1.{name}.weight"] = torch.ones(width)
    return {name: tensor.to(torch.bfloat16) for name, tensor in made.items()}


def _graph(generation: str, *, batch: int = 1, cfg: float = 1.0, masked: bool = False, raw: bool = True) -> Graph:
    width = sum(WIDTHS[generation]) if generation == "2.3" or not raw else WIDTHS[generation][0]
    graph = {
        "model": node("UNETLoader", unet_name=FILES[generation], weight_dtype="default"),
        "positive": node("TestText", seed=1, tokens=8, width=width, raw=raw),
        "negative": node("TestText", seed=2, tokens=8, width=width, raw=raw),
        "video": node("EmptyLTXVLatentVideo", width=96, height=64, length=9, batch_size=batch),
        "sound": node("TestSound", frames=5, batch_size=batch),
        "both": node("LTXVConcatAVLatent", video_latent=["video", 0], audio_latent=["sound", 0]),
        "sample": node(
            "KSampler",
            model=["model", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["both", 0],
            seed=3,
            steps=2,
            cfg=cfg,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "apart": node("LTXVSeparateAVLatent", av_latent=["sample", 0]),
        "save": node("SaveLatent", samples=["apart", 0], filename_prefix="latents/video"),
        "save sound": node("SaveLatent", samples=["apart", 1], filename_prefix="latents/sound"),
    }
    if masked:
        graph["first frame"] = node("TestVideoMask", samples=["video", 0])
        graph["both"]["inputs"]["video_latent"] = ["first frame", 0]
    return graph


def _latents(server: Server, graph: Graph) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = server.run(graph)
    return server.saved(outputs), server.saved(outputs, "save sound")


def _same(server: Server, graph: Graph, split: Graph, near: float = NEAR) -> None:
    for one, other in zip(_latents(server, split), _latents(server, graph), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=near)
        assert other.isfinite().all() and other.std() > 0.01


@pytest.mark.parametrize("generation", FILES)
@pytest.mark.parametrize("cut", range(BLOCKS + 1))
def test_every_cut(server: Server, worker: ProcessWorker, generation: str, cut: int) -> None:
    graph = _graph(generation)
    _same(server, graph, graphs.with_split(graph, worker.address, cut))


CASES = {
    "guided": {"cfg": 3.0},
    "batch": {"batch": 2},
    "first frame given": {"masked": True},
    "texts behind the connectors": {"raw": False},
}


@pytest.mark.parametrize("generation", FILES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cut", [0, 2])
def test_what_workflows_do(server: Server, worker: ProcessWorker, generation: str, case: str, cut: int) -> None:
    graph = _graph(generation, **CASES[case])
    _same(server, graph, graphs.with_split(graph, worker.address, cut), NEAR * (2 * CASES[case].get("cfg", 1.0) - 1))


@pytest.mark.parametrize("generation", FILES)
@pytest.mark.parametrize("cut", [0, 2, BLOCKS])
def test_read_in_parts(server: Server, worker: ProcessWorker, generation: str, cut: int) -> None:
    graph = _graph(generation)
    parts = graphs.with_split(graph, worker.address, cut, "parts")
    parts["model"] = node("MeshLoadDiffusionModel", unet_name=FILES[generation])
    _same(server, graph, parts)
    held = {
        name: t.nbytes for name, t in load_file(server.base / "models" / "diffusion_models" / FILES[generation]).items()
    }
    connectors = sum(size for name, size in held.items() if "connector" in name)
    assert server.state("parts")["held"] >= 2 * connectors  # ComfyUI computes in float32 here
    assert cut == BLOCKS or server.state("parts")["held"] < 2 * sum(held.values())


def test_a_lora(server: Server, worker: ProcessWorker) -> None:
    state = {}
    for block in range(BLOCKS):
        layer = f"diffusion_model.transformer_blocks.{block}.attn1.to_q"
        state[f"{layer}.lora_A.weight"] = randn(4, 32, seed=block)
        state[f"{layer}.lora_B.weight"] = randn(32, 4, seed=block + 10)
    save_file(state, server.base / "models" / "loras" / "ltx.safetensors")
    graph = _graph("2.3")
    plain = _latents(server, graph)[0]
    graphs.insert(graph, "lora", node("LoraLoaderModelOnly", lora_name="ltx.safetensors", strength_model=1.0))
    assert not torch.allclose(_latents(server, graph)[0], plain, atol=1e-3)
    _same(server, graph, graphs.with_split(graph, worker.address, 1))
