"""Files whose weights are quantised: each cut gives what ComfyUI gives of the same file without the mesh."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.quantise.kinds import WRITERS
from tests.comfy import graphs
from tests.comfy.graphs import node
from tests.comfy.install import ComfyUI
from tests.comfy.server import RunFailed, Server
from tests.support.workers import ProcessWorker

NEAR = 1e-5

EVERYWHERE = ("fp8-e4m3", "fp8-e5m2", "fp8-scaled-metadata", "fp8-mixed")
LATER = ("fp8-scaled", "fp8-scaled-old", "fp8-scaled-e5m2", "nvfp4", "mxfp8", "int8", "int8-rows", "int8-convrot")
"""Earlier versions do not read these, or lose what the file says of them while loading."""


def _file(server: Server, kind: str) -> str:
    """The model in a format, among ComfyUI's and the worker's."""
    folder = server.base / "models" / "diffusion_models"
    if not (folder / f"klein-{kind}.safetensors").exists():
        WRITERS[kind](load_file(folder / "tiny-klein.safetensors"), folder / f"klein-{kind}", {})
    return f"klein-{kind}.safetensors"


@pytest.fixture(params=[*EVERYWHERE, *LATER])
def kind(request: pytest.FixtureRequest, comfy: ComfyUI) -> str:
    found = str(request.param)
    if found in LATER and "int8_tensorwise" not in (comfy.folder / "comfy" / "quant_ops.py").read_text("utf-8"):
        pytest.skip("this ComfyUI does not read that format")
    return found


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


def test_it_is_not_read_in_parts(server: Server, worker: ProcessWorker) -> None:
    graph = graphs.text_to_latent()
    graph["model"] = node("MeshLoadDiffusionModel", unet_name=_file(server, "fp8-scaled-metadata"))
    with pytest.raises(RunFailed, match=r"is quantised \(fp8-scaled/F8_E4M3\)"):
        server.run(graphs.with_split(graph, worker.address, 2))
