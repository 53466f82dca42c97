"""Files whose weights are quantised: each cut gives what ComfyUI gives of the same file without the mesh."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.quantise import nvfp4
from benchmarks.quantise.kinds import WRITERS
from tests.comfy import graphs
from tests.comfy.graphs import node
from tests.comfy.install import ComfyUI
from tests.comfy.server import RunFailed, Server
from tests.support.workers import ProcessWorker

NEAR = 1e-5

EVERYWHERE = ("fp8-e4m3", "fp8-e5m2", "fp8-scaled-metadata", "fp8-mixed")
LATER = ("fp8-scaled", "fp8-scaled-old", "fp8-scaled-e5m2", "nvfp4", "mxfp8")
"""Earlier versions do not read these, or lose what the file says of them while loading."""
MULTIPLIED = ("int8", "int8-rows", "int8-convrot")
"""ComfyUI quantises the inputs of such layers on every machine, and workers do not."""


def _file(server: Server, kind: str) -> str:
    """The model in a format, among ComfyUI's and the worker's."""
    folder = server.base / "models" / "diffusion_models"
    if not (folder / f"klein-{kind}.safetensors").exists():
        tensors = load_file(folder / "tiny-klein.safetensors")
        if kind == "nvfp4":  # ComfyUI counts the columns of the embedders, which have half as many codes
            made, notes = nvfp4.quantise(tensors, [n for n, t in tensors.items() if "_blocks." in n and t.dim() == 2])
            save_file({n: t.contiguous() for n, t in made.items()}, folder / "klein-nvfp4.safetensors", notes)
        else:
            WRITERS[kind](tensors, folder / f"klein-{kind}", {})
    return f"klein-{kind}.safetensors"


@pytest.fixture(params=[*EVERYWHERE, *LATER])
def kind(request: pytest.FixtureRequest, comfy: ComfyUI) -> str:
    if request.param in LATER:
        _skip_if_earlier(comfy)
    return str(request.param)


def _skip_if_earlier(comfy: ComfyUI) -> None:
    if "int8_tensorwise" not in (comfy.folder / "comfy" / "quant_ops.py").read_text("utf-8"):
        pytest.skip("this ComfyUI does not read that format")


def test_it_is_split(server: Server, worker: ProcessWorker, kind: str) -> None:
    graph = graphs.text_to_latent(model=_file(server, kind), seed=51)
    whole = server.latent(graph)
    assert not torch.equal(whole, server.latent(graphs.text_to_latent(seed=51)))
    for cut in (0, 3, 4, 9):
        split = server.latent(graphs.with_split(graph, worker.address, cut))
        torch.testing.assert_close(split, whole, rtol=0, atol=NEAR)


@pytest.mark.parametrize(("kind", "held"), [("fp8-e4m3", "fp8_e4m3fn"), ("fp8-scaled-metadata", "default")])
@pytest.mark.parametrize("cut", range(13))
def test_every_cut(server: Server, worker: ProcessWorker, kind: str, held: str, cut: int) -> None:
    """Of weights that ComfyUI holds quantised; on a GPU it does so without being told."""
    graph = graphs.text_to_latent(model=_file(server, kind), steps=1)
    graph["model"]["inputs"]["weight_dtype"] = held
    split = server.latent(graphs.with_split(graph, worker.address, cut, "parts"))
    torch.testing.assert_close(split, server.latent(graph), rtol=0, atol=NEAR)
    size = (server.base / "models" / "diffusion_models" / _file(server, kind)).stat().st_size
    assert cut == 12 or server.state("parts")["held"] < 1.1 * size * (cut + 3) / 12 + (3 << 20)


@pytest.mark.parametrize("kind", MULTIPLIED)
def test_what_workers_would_compute_otherwise_is_named(
    server: Server, worker: ProcessWorker, comfy: ComfyUI, kind: str
) -> None:
    _skip_if_earlier(comfy)
    graph = graphs.text_to_latent(model=_file(server, kind))
    with pytest.raises(RunFailed, match="multiplies with weights stored as int8/I8"):
        server.run(graphs.with_split(graph, worker.address, 3))
    assert torch.equal(server.latent(graphs.with_split(graph, worker.address, 12)), server.latent(graph))


def test_it_is_not_read_in_parts(server: Server, worker: ProcessWorker) -> None:
    graph = graphs.text_to_latent()
    graph["model"] = node("MeshLoadDiffusionModel", unet_name=_file(server, "fp8-scaled-metadata"))
    with pytest.raises(RunFailed, match=r"is quantised \(fp8-scaled/F8_E4M3\)"):
        server.run(graphs.with_split(graph, worker.address, 2))
