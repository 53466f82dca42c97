"""LoRAs anywhere in the graph change blocks here and on workers alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.comfy import algorithms, graphs
from tests.comfy.graphs import Graph, node
from tests.comfy.server import RunFailed, Server
from tests.support.workers import ProcessWorker

NIGHT, MESHLING = "night.kohya.safetensors", "meshling.kohya.safetensors"


def _lora(graph: Graph, name: str, file: str, strength: float) -> Graph:
    graphs.insert(graph, name, node("LoraLoaderModelOnly", lora_name=file, strength_model=strength))
    return graph


def _near(split: torch.Tensor, whole: torch.Tensor) -> None:
    torch.testing.assert_close(split, whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("cut", [0, 2, 6])
def test_before_and_behind_the_node(server: Server, worker: ProcessWorker, cut: int) -> None:
    plain = server.latent(graphs.text_to_latent())
    whole = server.latent(_lora(graphs.text_to_latent(), "night", NIGHT, 1.0))
    assert (whole - plain).abs().max() > 0.1
    before = graphs.with_split(_lora(graphs.text_to_latent(), "night", NIGHT, 1.0), worker.address, cut)
    behind = _lora(graphs.with_split(graphs.text_to_latent(), worker.address, cut), "night", NIGHT, 1.0)
    _near(server.latent(before), whole)
    _near(server.latent(behind), whole)


@pytest.fixture(scope="module")
def made(base: Path) -> str:
    """The folder of files of all algorithms, as the loader lists it."""
    algorithms.write(base / "models" / "loras" / "made")
    return "made"


@pytest.mark.parametrize("algorithm", [*algorithms.MADE, "norm"])
def test_every_algorithm(server: Server, worker: ProcessWorker, made: str, algorithm: str) -> None:
    graph = graphs.text_to_latent(seed=31, steps=1)
    plain = server.latent(graph)
    whole = server.latent(_lora(graph, "made", f"{made}/{algorithm}.safetensors", 0.8))
    assert whole.isfinite().all() and (whole - plain).abs().max() > 0.01
    for cut in (2, 6):
        _near(server.latent(graphs.with_split(graph, worker.address, cut)), whole)


@pytest.mark.parametrize("order", [("diff", "lora", "set"), ("set", "oft", "diff"), ("set", "diff", "lora")])
def test_the_order_of_the_loaders_counts(
    server: Server, worker: ProcessWorker, made: str, order: tuple[str, ...]
) -> None:
    graph = graphs.text_to_latent(seed=32, steps=1)
    for algorithm in order:
        _lora(graph, algorithm, f"{made}/{algorithm}.safetensors", 1.0)
    _near(server.latent(graphs.with_split(graph, worker.address, 3)), server.latent(graph))


@pytest.mark.parametrize(
    ("file", "said"), [("bare", "BOFT LoRA without alpha"), ("core", "LoKr LoRA with a Tucker core")]
)
def test_what_comfyui_itself_cannot_apply_is_refused(
    server: Server, worker: ProcessWorker, made: str, file: str, said: str
) -> None:
    graph = _lora(graphs.text_to_latent(), "made", f"{made}/{file}.safetensors", 1.0)
    with pytest.raises(RunFailed, match=said):
        server.run(graphs.with_split(graph, worker.address, 2))


def test_two_stacked_then_another_strength_then_none(server: Server, worker: ProcessWorker) -> None:
    plain = graphs.text_to_latent(seed=5)
    for night, meshling in ((0.7, 0.4), (0.7, -0.3), (0.0, 1.0)):
        both = _lora(_lora(graphs.text_to_latent(seed=5), "night", NIGHT, night), "meshling", MESHLING, meshling)
        _near(server.latent(graphs.with_split(both, worker.address, 3)), server.latent(both))
    _near(server.latent(graphs.with_split(plain, worker.address, 3)), server.latent(plain))


def test_a_model_merge_is_refused_by_name(server: Server, worker: ProcessWorker) -> None:
    graph = graphs.text_to_latent()
    graph["other"] = node("UNETLoader", unet_name="tiny-klein.safetensors", weight_dtype="default")
    graphs.insert(graph, "merge", node("ModelMergeSimple", model2=["other", 0], ratio=0.5), "model1", "model")
    with pytest.raises(RunFailed, match="merge of whole models"):
        server.run(graphs.with_split(graph, worker.address, 3))


def test_a_lora_of_the_workers_library(server: Server, worker: ProcessWorker) -> None:
    whole = server.latent(_lora(graphs.text_to_latent(), "night", NIGHT, 0.8))

    def with_remote(cut: int) -> Graph:
        graph = graphs.with_split(graphs.text_to_latent(), worker.address, cut)
        chosen = {"worker": "pasted below", "address": "", "lora": "night-of-the-worker.safetensors"}
        graphs.insert(graph, "remote", node("MeshRemoteLora", **chosen, strength=0.8))
        return graph

    _near(server.latent(with_remote(0)), whole)
    with pytest.raises(RunFailed, match="2 blocks run here"):
        server.run(with_remote(2))


def test_never_send(server: Server, worker: ProcessWorker) -> None:
    graph = _lora(graphs.text_to_latent(), "meshling", "meshling.safetensors", 0.5)
    with pytest.raises(RunFailed) as failed:
        server.run(graphs.with_split(graph, worker.address, 3, loras="never send"))
    assert "LoraTooLarge" in failed.value.kind or "LoraMissing" in failed.value.kind
