"""What cannot cross a cut is refused by name before sampling starts, and works when its blocks are here."""

from __future__ import annotations

import pytest
import torch

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


LATE = {
    "skipped layers": ("SkipLayerGuidanceDiT", {"scale": 3.0, "rescaling_scale": 0.0}),
    "skipped layers, simple": ("SkipLayerGuidanceDiTSimple", {}),
}


def _skipping(kind: str, double: str, single: str) -> Graph:
    node_type, inputs = LATE[kind]
    graph = graphs.text_to_latent(steps=1, cfg=2.0)
    layers = {"double_layers": double, "single_layers": single, "start_percent": 0.0, "end_percent": 1.0}
    graphs.insert(graph, "late", node(node_type, **inputs, **layers))
    return graph


@pytest.mark.parametrize("kind", LATE)
def test_layers_skipped_by_guidance(server: Server, worker: ProcessWorker, kind: str) -> None:
    """These nodes change the options while sampling, long after the model was looked at."""
    here = _skipping(kind, "1", "")
    whole = server.latent(here)
    assert (whole - server.latent(graphs.text_to_latent(steps=1, cfg=2.0))).abs().max() > 0.1
    torch.testing.assert_close(server.latent(graphs.with_split(here, worker.address, 2)), whole, rtol=0, atol=6e-5)
    for double, single, text, enough in [("3", "", "double_block 3", 4), ("0", "0, 2", "single_block 2", 7)]:
        with pytest.raises(RunFailed) as failed:
            server.run(graphs.with_split(_skipping(kind, double, single), worker.address, 2))
        assert f"a replacement of dit {text} (patches_replace)" in failed.value.text
        assert f"local_blocks {enough} or more" in failed.value.text


@pytest.mark.parametrize("kind", ["function", "wrapper"])
@pytest.mark.parametrize("behind", [False, True], ids=["before the node", "behind the node"])
def test_what_is_put_in_while_sampling(server: Server, worker: ProcessWorker, kind: str, behind: bool) -> None:
    late = node("TestLate", kind=kind, name="single_block", number=7)
    graph = graphs.text_to_latent(steps=1)
    if behind:
        graph = graphs.with_split(graph, worker.address, 2)
        graphs.insert(graph, "late", late)
    else:
        graphs.insert(graph, "late", late)
        graph = graphs.with_split(graph, worker.address, 2)
    with pytest.raises(RunFailed, match=r"dit single_block 7 \(patches_replace\)"):
        server.run(graph)


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
    # Other tests give the worker Klein in 8-bit floats too.
    graph = graphs.with_split(graphs.text_to_latent(model="tiny-dev.safetensors"), worker.address, 2)
    graph["model"]["inputs"]["weight_dtype"] = "fp8_e4m3fn"
    with pytest.raises(RunFailed, match="weight_dtype 'default'"):
        server.run(graph)
