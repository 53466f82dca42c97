"""ComfyUI's memory management counts what is here of a split model, and may unload it at any time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.comfy import graphs
from tests.comfy.graphs import Graph, node
from tests.comfy.install import ComfyUI
from tests.comfy.server import Server
from tests.support.workers import ProcessWorker, wait_until

LOADERS = {"whole": "UNETLoader", "in parts": "MeshLoadDiffusionModel"}


def _measured(graph: Graph, model: str, *, after: bool) -> Graph:
    graph["memory"] = node("TestMemory", model=[model, 0], **({"after": ["sample", 0]} if after else {}))
    return graph


def _without_sampling(graph: Graph, model: str) -> Graph:
    kept = {name: inputs for name, inputs in graph.items() if name in ("model", "split")}
    return _measured(kept, model, after=False)


def _split(worker: ProcessWorker, loader: str, cut: int) -> Graph:
    graph = graphs.text_to_latent(seed=41)
    if LOADERS[loader] != "UNETLoader":
        graph["model"] = node(LOADERS[loader], unet_name=graph["model"]["inputs"]["unet_name"])
    return graphs.with_split(graph, worker.address, cut)


def _size(server: Server, graph: Graph, model: str) -> dict[str, Any]:
    return server.run(_measured(graph, model, after=True))["memory"]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("cut", [3, 6])
def test_only_local_blocks_count(server: Server, worker: ProcessWorker, loader: str, cut: int) -> None:
    server.forget()
    whole = _size(server, graphs.text_to_latent(seed=41), "model")["size"][0]
    server.forget()
    found = _size(server, _split(worker, loader, cut), "split")
    held = server.state("split")["held"]
    assert 0 < held < whole * (cut + 3) / 12
    assert held <= found["size"][0] <= held + 50_000  # ComfyUI keeps a table of sigmas
    assert 0.9 * held < found["loaded"][0] <= found["size"][0]
    assert found["size"][0] in found["managed"] and whole not in found["managed"]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("freed", ["unload_models", "free_memory"])
def test_freed_between_two_runs(server: Server, worker: ProcessWorker, loader: str, freed: str) -> None:
    first = server.latent(_split(worker, loader, 4))
    held = server.state("split")["held"]
    server.send("/free", {freed: True})
    looks = _without_sampling(_split(worker, loader, 4), "split")
    wait_until(lambda: server.run(looks)["memory"]["loaded"] == [0], 30, "unloading")
    assert server.run(looks)["memory"]["managed"] == []
    again = _measured(_split(worker, loader, 4), "split", after=True)
    outputs = server.run(again)
    assert server.ran("sample")
    assert torch.equal(server.saved(outputs), first)
    assert 0.9 * held < outputs["memory"]["loaded"][0]
    assert server.state("split")["held"] == held


@pytest.fixture
def dynamic(comfy: ComfyUI) -> Graph:
    if "class ModelPatcherDynamic" not in (comfy.folder / "comfy" / "model_patcher.py").read_text("utf-8"):
        pytest.skip("this ComfyUI has no dynamic memory management")
    graph = graphs.text_to_latent(seed=42)
    graphs.insert(graph, "dynamic", node("TestDynamic"))
    return graph


def test_nothing_is_shared_under_dynamic_memory_management(
    server: Server, worker: ProcessWorker, dynamic: Graph
) -> None:
    """The whole model was loaded before it is split: GPU pages and pins of its modules stay its own."""
    whole = server.latent(dynamic)
    split = graphs.with_split(dynamic, worker.address, 3)
    split["pages"] = node("TestPages", one=["dynamic", 0], other=["split", 0], after=["sample", 0])
    outputs = server.run(split)
    assert not server.ran("dynamic")
    torch.testing.assert_close(server.saved(outputs), whole, rtol=0, atol=1e-5)
    found = outputs["pages"]
    assert found["kinds"] == ["OnCpu", "OnCpu"]
    assert found["shared"] == [0] and found["owners"] == [1, 1]
    assert 0 < found["pages"][1] < found["pages"][0]
    torch.testing.assert_close(server.latent(graphs.text_to_latent(seed=42)), whole, rtol=0, atol=0)


def test_another_copy_for_hooks_is_split_too(server: Server, worker: ProcessWorker, dynamic: Graph) -> None:
    whole = server.latent(dynamic)
    split = graphs.with_split(dynamic, worker.address, 3)
    graphs.insert(split, "plain", node("TestNotDynamic"))
    torch.testing.assert_close(server.latent(split), whole, rtol=0, atol=1e-5)
    assert server.state("split")["steps"] == 2
