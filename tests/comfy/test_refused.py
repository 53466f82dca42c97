"""What cannot cross a cut is refused by name before sampling starts, and works when its blocks are here."""

from __future__ import annotations

import pytest

from tests.comfy import graphs
from tests.comfy.graphs import Graph, node
from tests.comfy.server import RunFailed, Server
from tests.support.workers import ProcessWorker

CASES = {
    "replaced remote block": (
        "TestPatchBlock",
        {"kind": "dit", "name": "double_block", "number": 3},
        "dit double_block 3",
    ),
    "block patch": ("TestBlockPatch", {"kind": "double_block"}, "kind 'double_block'"),
    "attention override": ("TestAttention", {}, "optimized_attention_override"),
    "injection": ("TestInjection", {}, "injection into the model (test)"),
    "replaced forward": ("TestObjectPatch", {"name": "diffusion_model.forward_orig"}, "diffusion_model.forward_orig"),
}


def _with(case: str) -> tuple[Graph, str]:
    kind, inputs, text = CASES[case]
    graph = graphs.text_to_latent(steps=1)
    graphs.insert(graph, "attached", node(kind, **inputs))
    return graph, text


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("behind", [False, True], ids=["before the node", "behind the node"])
def test_it_is_named(server: Server, worker: ProcessWorker, case: str, behind: bool) -> None:
    if behind:
        graph = graphs.with_split(graphs.text_to_latent(steps=1), worker.address, 2)
        kind, inputs, text = CASES[case]
        graphs.insert(graph, "attached", node(kind, **inputs))
    else:
        attached, text = _with(case)
        graph = graphs.with_split(attached, worker.address, 2)
    with pytest.raises(RunFailed) as failed:
        server.run(graph)
    assert text in failed.value.text and "Try:" in failed.value.text


def test_a_patch_of_a_local_block_works(server: Server, worker: ProcessWorker) -> None:
    graph = graphs.text_to_latent(steps=1)
    graphs.insert(graph, "attached", node("TestPatchBlock", kind="dit", name="double_block", number=1))
    whole = server.latent(graph)
    assert not whole.equal(server.latent(graphs.text_to_latent(steps=1)))
    split = server.latent(graphs.with_split(graph, worker.address, 2))
    assert (split - whole).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("attached", "text"), [("TestControl", "ControlNet (TestResiduals)"), ("TestMask", "attention_mask")]
)
def test_a_conditioning_is_named(server: Server, worker: ProcessWorker, attached: str, text: str) -> None:
    graph = graphs.with_split(graphs.text_to_latent(steps=1), worker.address, 2)
    graphs.insert(graph, "attached", node(attached), "conditioning", "positive")
    with pytest.raises(RunFailed) as failed:
        server.run(graph)
    assert text in failed.value.text


def test_split_twice(server: Server, worker: ProcessWorker) -> None:
    graph = graphs.with_split(graphs.text_to_latent(steps=1), worker.address, 2)
    inputs = {**graph["split"]["inputs"]}
    inputs.pop("model")
    graphs.insert(graph, "again", node("MeshSplit", **inputs))
    with pytest.raises(RunFailed, match="split already"):
        server.run(graph)


def test_more_blocks_than_there_are(server: Server, worker: ProcessWorker) -> None:
    with pytest.raises(RunFailed, match="has 12 blocks; 13 cannot run here"):
        server.run(graphs.with_split(graphs.text_to_latent(), worker.address, 13))


def test_weights_in_a_form_that_no_worker_has(server: Server, worker: ProcessWorker) -> None:
    graph = graphs.with_split(graphs.text_to_latent(), worker.address, 2)
    graph["model"]["inputs"]["weight_dtype"] = "fp8_e4m3fn"
    with pytest.raises(RunFailed, match="weight_dtype 'default'"):
        server.run(graph)
