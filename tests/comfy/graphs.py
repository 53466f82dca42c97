"""Workflows as ComfyUI's API takes them: a model, perhaps the mesh, a sampler, a saved latent."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

MODEL = str(Path(__file__).parents[2] / "examples" / "tiny-klein" / "model")

Graph = dict[str, Any]


def node(class_type: str, /, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def text_to_latent(
    *,
    model: str = "tiny-klein.safetensors",
    text: str = "crying face",
    seed: int = 0,
    steps: int = 2,
    width: int = 128,
    height: int = 128,
    batch: int = 1,
    cfg: float = 1.0,
    sampler: str = "euler",
    scheduler: str = "simple",
    denoise: float = 1.0,
) -> Graph:
    return {
        "model": node("UNETLoader", unet_name=model, weight_dtype="default"),
        "positive": node("TinyKleinTextEncode", text=text, model_folder=MODEL),
        "negative": node("TinyKleinTextEncode", text="", model_folder=MODEL),
        "empty": node("EmptyFlux2LatentImage", width=width, height=height, batch_size=batch),
        "sample": node(
            "KSampler",
            model=["model", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["empty", 0],
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name=sampler,
            scheduler=scheduler,
            denoise=denoise,
        ),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="latents/test"),
    }


def insert(graph: Graph, name: str, added: dict[str, Any], inlet: str = "model", outlet: str | None = None) -> None:
    """Put ``added`` in front of the sampler's input ``outlet``, which becomes its own input ``inlet``."""
    outlet = outlet or inlet
    added["inputs"] = {inlet: graph["sample"]["inputs"][outlet], **added["inputs"]}
    graph[name] = added
    graph["sample"]["inputs"][outlet] = [name, 0]


def with_split(graph: Graph, address: str, local: int, name: str = "split", **changes: Any) -> Graph:
    """The graph with a Mesh Split, called ``name``, right before the sampler, on the worker at ``address``."""
    result = deepcopy(graph)
    inputs = {"worker": "pasted below", "address": address, "local_blocks": local, "quality": "lossless"}
    insert(result, name, node("MeshSplit", **inputs, loras="automatic", on_failure="wait for it"))
    result[name]["inputs"] |= changes
    return result
