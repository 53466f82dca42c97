"""Workflows as ComfyUI's API takes them: a model, perhaps the mesh, a sampler, a saved latent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODEL = str(Path(__file__).parents[2] / "examples" / "tiny-klein" / "model")

Graph = dict[str, Any]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def klein(
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
    mesh: dict[str, Any] | None = None,
) -> Graph:
    """Text to latent; ``mesh``: the inputs of Mesh Split, None for none."""
    graph: Graph = {
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
    if mesh is not None:
        insert(graph, "split", node("MeshSplit", **mesh))
    return graph


def insert(graph: Graph, name: str, added: dict[str, Any], before: str = "sample", **inputs: Any) -> None:
    """Put a MODEL to MODEL node before ``before``."""
    added["inputs"] = {"model": graph[before]["inputs"]["model"], **added["inputs"], **inputs}
    graph[name] = added
    graph[before]["inputs"]["model"] = [name, 0]


def split(address: str, local: int, **changes: Any) -> dict[str, Any]:
    """The inputs of Mesh Split for a worker that is named by its address."""
    chosen = {"worker": "pasted below", "address": address, "local_blocks": local, "quality": "lossless"}
    return {**chosen, "loras": "automatic", "on_failure": "wait for it", **changes}
