"""Mesh Split at every cut gives the latents that ComfyUI gives without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.comfy import graphs
from tests.comfy.graphs import Graph
from tests.comfy.server import Server
from tests.support.workers import ProcessWorker

NEAR = 1e-5
"""ComfyUI's blocks and diffusers' differ by about 1e-6 in float32."""

MANY = {
    "batch": {"batch": 2},
    "not square": {"width": 128, "height": 64},
    "guided, another sampler": {"cfg": 3.0, "sampler": "dpmpp_2m", "scheduler": "beta"},
    "stochastic": {"sampler": "euler_ancestral"},
}


def _same(server: Server, worker: ProcessWorker, graph: Graph, cut: int, **changes: Any) -> torch.Tensor:
    """The latents with the mesh, which are those without it."""
    whole = server.latent(graph)
    split = server.latent(graphs.with_split(graph, worker.address, cut, **changes))
    # Guidance multiplies what the two runs of a step differ by: cfg * conditional - (cfg - 1) * unconditional.
    near = NEAR * (2 * graph["sample"]["inputs"]["cfg"] - 1)
    torch.testing.assert_close(split, whole, rtol=0, atol=near)
    return split


@pytest.mark.parametrize("cut", range(12))
def test_every_cut_of_klein(server: Server, worker: ProcessWorker, cut: int) -> None:
    _same(server, worker, graphs.text_to_latent(steps=1), cut)


@pytest.mark.parametrize("cut", range(4))
def test_every_cut_of_a_model_with_guidance(server: Server, worker: ProcessWorker, cut: int) -> None:
    graph = graphs.text_to_latent(model="tiny-dev.safetensors")
    graphs.insert(graph, "guide", graphs.node("FluxGuidance", guidance=2.5), "conditioning", "positive")
    _same(server, worker, graph, cut)


def test_nothing_remote_is_the_model_itself(server: Server, worker: ProcessWorker) -> None:
    graph = graphs.text_to_latent(seed=3)
    whole = server.latent(graph)
    server.forget()
    assert torch.equal(server.latent(graphs.with_split(graph, worker.address, 12)), whole)


@pytest.mark.parametrize("case", MANY)
@pytest.mark.parametrize("cut", [0, 3])
def test_what_samplers_do(server: Server, worker: ProcessWorker, case: str, cut: int) -> None:
    _same(server, worker, graphs.text_to_latent(**MANY[case]), cut)


@pytest.mark.parametrize("cut", [0, 3])
def test_reference_images(server: Server, worker: ProcessWorker, cut: int) -> None:
    graph = graphs.text_to_latent()
    for name in ("first", "second"):
        graph[f"{name} image"] = graphs.node("LoadLatent", latent=f"{name}.latent")
        graphs.insert(
            graph, name, graphs.node("ReferenceLatent", latent=[f"{name} image", 0]), "conditioning", "positive"
        )
    _same(server, worker, graph, cut)


def test_an_image_as_start_and_a_mask(server: Server, worker: ProcessWorker) -> None:
    graph = graphs.text_to_latent(denoise=0.6)
    graph["start"] = graphs.node("LoadLatent", latent="first.latent")
    graph["half"] = graphs.node("SolidMask", value=0.7, width=128, height=128)
    graph["masked"] = graphs.node("SetLatentNoiseMask", samples=["start", 0], mask=["half", 0])
    graph["sample"]["inputs"]["latent_image"] = ["masked", 0]
    _same(server, worker, graph, 5)


def test_two_runs_are_equal_to_the_bit(server: Server, worker: ProcessWorker) -> None:
    graph = graphs.with_split(graphs.text_to_latent(), worker.address, 5)
    first = server.latent(graph)
    server.forget()
    again = server.latent(graph)
    assert server.ran("sample") and torch.equal(first, again)


def test_a_queue_of_different_work(server: Server, worker: ProcessWorker) -> None:
    """Prompts, sizes, batches, models and cuts in one session; nothing of one run is left in the next."""
    work = [
        (graphs.text_to_latent(text="red apple", seed=1), 5),
        (graphs.text_to_latent(text="red apple", seed=2, width=64, batch=2), 5),
        (graphs.text_to_latent(model="tiny-dev.safetensors", seed=2), 2),
        (graphs.text_to_latent(text="blue book", seed=1), 2),
        (graphs.text_to_latent(text="blue book", seed=1), 9),
    ]
    queued = [server.queue(graphs.with_split(graph, worker.address, cut)) for graph, cut in work]
    split = [server.saved(server.wait(prompt)) for prompt in queued]
    for (graph, _), latent in zip(work, split, strict=True):
        torch.testing.assert_close(latent, server.latent(graph), rtol=0, atol=NEAR)


def test_a_coded_state_gives_nearly_the_same(server: Server, worker: ProcessWorker) -> None:
    graph = graphs.text_to_latent()
    whole = server.latent(graph)
    coded = server.latent(graphs.with_split(graph, worker.address, 4, quality="transparent"))
    assert not torch.equal(coded, whole)
    assert (coded - whole).square().mean().sqrt() < 0.05 * whole.std()
