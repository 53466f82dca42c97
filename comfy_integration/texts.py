"""Every text of the nodes: titles, descriptions, tooltips. The panel and the settings page have theirs in web/texts.js.

What the qualities promise comes from the codecs. Imports nothing, so that nodes that cannot run have their titles too.
"""

from __future__ import annotations

CATEGORY = "mesh"

TITLES = {
    "MeshSplit": "Mesh Split",
    "MeshLoadDiffusionModel": "Mesh Load Diffusion Model",
    "MeshWorkers": "Mesh Workers",
    "MeshRemoteLora": "Mesh Remote LoRA",
}
"""By node id. Ids and the names of inputs are in saved workflows: they stay."""

DESCRIPTIONS = {
    "MeshSplit": "Runs the last blocks of a diffusion model on another machine. Put it between the model loader and "
    "the sampler; the picture is the same.",
    "MeshLoadDiffusionModel": "Loads a diffusion model that is larger than this machine's memory: only the blocks that "
    "run here are read, when Mesh Split behind it runs.",
    "MeshWorkers": "Several workers in the order in which they run: connect one after the other, the last one to Mesh "
    "Split. Each hands its state to the next directly.",
    "MeshRemoteLora": "Applies a LoRA from the library of the worker, without a copy on this machine. Stackable. "
    "Blocks that run here need the file here too: then ComfyUI applies it, and the worker uses its own copy.",
}

WORKER = "The machine that runs the blocks behind the cut. Workers are added in Settings > Mesh, or by an invite below."
PASTED = "pasted below"
"""The choice of a worker that takes the text field."""
ADDRESS = (
    "For 'pasted below': the line that mesh serve printed on the worker's machine, or mesh://HOST:PORT of a worker "
    "that is known here."
)

SPLIT_MODEL = "Any model whose family has an adapter, for example FLUX.2 Dev or Klein."
SPLIT_LOCAL_BLOCKS = "How many blocks run on this machine; the rest runs on the worker. -1: as many as fit."
SPLIT_LORAS = (
    "LoRAs that the worker does not have. automatic: small ones are sent once; for a large one the run stops and says "
    "where to put the file."
)
SPLIT_ON_FAILURE = "When the worker goes away during a run. run here: if the whole model fits this machine."
SPLIT_WORKERS = "Several workers from Mesh Workers, in place of the one above."
SPLIT_OUTPUT = "The same model; samplers use it like any other."

WORKERS_BLOCKS = "How many blocks this worker runs. 0 in all of them: shared by size."
WORKERS_BEFORE = "The workers that run before this one."

LOADER_FILE = "A file in models/diffusion_models."
LOADER_OUTPUT = "Connect it to Mesh Split, LoRA loaders in between if you like."

LORA_MODEL = "Before or behind Mesh Split."
LORA_NONE = "none"
"""The choice of no LoRA."""
LORA_NAME = "LoRAs of that worker; the button asks it anew."
LORA_STRENGTH = "0 is off."
