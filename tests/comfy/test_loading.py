"""Mesh Load Diffusion Model reads what runs here; Mesh Workers makes chains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.comfy import graphs
from tests.comfy.graphs import Graph, node
from tests.comfy.server import RunFailed, Server
from tests.support.workers import ProcessWorker, process_worker


def _in_parts(graph: Graph) -> Graph:
    graph["model"] = node("MeshLoadDiffusionModel", unet_name=graph["model"]["inputs"]["unet_name"])
    return graph


@pytest.mark.parametrize("cut", [0, 5, 3, 9, 12])
def test_only_the_local_span_is_read(server: Server, worker: ProcessWorker, cut: int) -> None:
    whole = server.latent(graphs.text_to_latent(seed=21))
    split = server.latent(graphs.with_split(_in_parts(graphs.text_to_latent(seed=21)), worker.address, cut, "parts"))
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-5)
    held = server.state("parts")["held"]
    size = (server.base / "models" / "diffusion_models" / "tiny-klein.safetensors").stat().st_size
    # ComfyUI computes in float32 here, so what is held has twice the bytes of the file's share.
    assert held == 0 if cut == 0 else 0 < held <= 2 * size
    assert cut == 12 or held < 2 * size * (cut + 3) / 12


def test_another_cut_reads_the_difference(server: Server, worker: ProcessWorker) -> None:
    def read(cut: int) -> int:
        graph = _in_parts(graphs.text_to_latent(seed=22, steps=1))
        server.latent(graphs.with_split(graph, worker.address, cut, "change"))
        return int(server.state("change")["bytes_read"])

    server.forget()
    first, more, less = read(4), read(6), read(5)
    assert 0 < first < more == less


def test_a_lora_between_loader_and_node(server: Server, worker: ProcessWorker) -> None:
    graph = graphs.text_to_latent(seed=23)
    lora = node("LoraLoaderModelOnly", lora_name="night.kohya.safetensors", strength_model=0.9)
    graphs.insert(graph, "night", lora)
    whole = server.latent(graph)
    split = server.latent(graphs.with_split(_in_parts(graph), worker.address, 3))
    torch.testing.assert_close(split, whole, rtol=0, atol=2e-5)


def test_without_the_node_it_says_what_is_missing(server: Server) -> None:
    with pytest.raises(RunFailed, match="Mesh Split behind its loader"):
        server.run(_in_parts(graphs.text_to_latent()))


def test_two_workers_in_a_chain(server: Server, worker: ProcessWorker, base: Path, home: Path) -> None:
    graph = graphs.text_to_latent(seed=24)
    whole = server.latent(graph)
    with process_worker(base / "models" / "diffusion_models", home=home, name="second") as second:
        split = graphs.with_split(graph, "", 3, "chain")
        split["w1"] = node("MeshWorkers", worker="pasted below", address=worker.address, blocks=4)
        split["w2"] = node("MeshWorkers", worker="pasted below", address=second.address, blocks=5, before=["w1", 0])
        split["chain"]["inputs"]["workers"] = ["w2", 0]
        torch.testing.assert_close(server.latent(split), whole, rtol=0, atol=1e-5)
        assert [w["span"] for w in server.state("chain")["workers"]] == ["3:7", "7:12"]
        split["w1"]["inputs"]["blocks"], split["w2"]["inputs"]["blocks"] = 0, 0
        torch.testing.assert_close(server.latent(split), whole, rtol=0, atol=1e-5)
        split["w1"]["inputs"]["blocks"] = 3
        split["w2"]["inputs"]["blocks"] = 4
        with pytest.raises(RunFailed, match="run 7 of 9 blocks"):
            server.run(split)


def test_a_proposed_cut(server: Server, worker: ProcessWorker) -> None:
    """This machine holds the whole model, so all of it runs here and the latents are its own."""
    graph = graphs.text_to_latent(seed=25)
    assert torch.equal(server.latent(graphs.with_split(graph, worker.address, -1, "auto")), server.latent(graph))
    assert server.state("auto")["local"] == 12
