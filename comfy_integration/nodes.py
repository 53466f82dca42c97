"""The nodes, as ComfyUI's V3 schema describes them. What they do is in other modules, imported when they run."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from mesh_codec.qualities import EXACT, names, promises

from .hub import current
from .workers import WorkerRef, address_of, choices

CATEGORY = "mesh"
MeshWorkers = io.Custom("MESH_WORKERS")
NO_LORA = "none"

_WORKER = (
    "The machine that runs the blocks behind the cut. Workers are added in Settings > Mesh, or by an invite below."
)
_ADDRESS = (
    "For 'pasted below': the line that mesh serve printed on the worker's machine, or mesh://HOST:PORT of a worker "
    "that is known here."
)


def _worker_inputs() -> list[Any]:
    options = choices()
    return [
        io.Combo.Input("worker", options=options, default=options[0], tooltip=_WORKER),
        io.String.Input("address", default="", tooltip=_ADDRESS),
    ]


class MeshSplit(io.ComfyNode):
    """MODEL in, MODEL out: the blocks behind the cut run on a worker."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MeshSplit",
            display_name="Mesh Split",
            category=CATEGORY,
            description="Runs the last blocks of a diffusion model on another machine. Put it between the model loader "
            "and the sampler; the picture is the same.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="Any model whose family has an adapter, for example FLUX.2 Dev or Klein."
                ),
                *_worker_inputs(),
                io.Int.Input(
                    "local_blocks",
                    default=-1,
                    min=-1,
                    max=1000,
                    tooltip="How many blocks run on this machine; the rest runs on the worker. -1: as many as fit.",
                ),
                io.Combo.Input(
                    "quality",
                    options=list(names()),
                    default=EXACT,
                    tooltip=f"How the state crosses the network. {promises()}",
                ),
                io.Combo.Input(
                    "loras",
                    options=["automatic", "always send", "never send"],
                    default="automatic",
                    tooltip="LoRAs that the worker does not have. automatic: small ones are sent once; for a large one "
                    "the run stops and says where to put the file.",
                ),
                io.Combo.Input(
                    "on_failure",
                    options=["wait for it", "run here", "stop"],
                    default="wait for it",
                    tooltip="When the worker goes away during a run. run here: if the whole model fits this machine.",
                ),
                MeshWorkers.Input(
                    "workers", optional=True, tooltip="Several workers from Mesh Workers, in place of the one above."
                ),
            ],
            outputs=[io.Model.Output(tooltip="The same model; samplers use it like any other.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, worker: str) -> bool | str:
        # The list of workers changes without a restart: any text of that form may run and says by itself what is wrong.
        return True

    @classmethod
    def execute(
        cls,
        model: Any,
        worker: str,
        address: str,
        local_blocks: int,
        quality: Any,
        loras: str,
        on_failure: Any,
        workers: tuple[WorkerRef, ...] = (),
    ) -> io.NodeOutput:
        from .cutting import Choice, cut

        chain = workers or (WorkerRef(address_of(worker, address)),)
        choice = Choice(chain, None if local_blocks < 0 else local_blocks, quality, loras, on_failure)
        return io.NodeOutput(cut(model, choice, current(), str(cls.hidden.unique_id)))


class MeshWorkersNode(io.ComfyNode):
    """A chain of workers, one node each."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MeshWorkers",
            display_name="Mesh Workers",
            category=CATEGORY,
            description="Several workers in the order in which they run: connect one after the other, the last one to "
            "Mesh Split. Each hands its state to the next directly.",
            inputs=[
                *_worker_inputs(),
                io.Int.Input(
                    "blocks",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="How many blocks this worker runs. 0 in all of them: shared by size.",
                ),
                MeshWorkers.Input("before", optional=True, tooltip="The workers that run before this one."),
            ],
            outputs=[MeshWorkers.Output(display_name="workers")],
        )

    @classmethod
    def validate_inputs(cls, worker: str) -> bool | str:
        return True

    @classmethod
    def execute(cls, worker: str, address: str, blocks: int, before: tuple[WorkerRef, ...] = ()) -> io.NodeOutput:
        return io.NodeOutput((*before, WorkerRef(address_of(worker, address), blocks or None)))


class MeshLoadDiffusionModel(io.ComfyNode):
    """A model of which only the local span is read, once a Mesh Split says which that is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        import folder_paths

        files = [n for n in folder_paths.get_filename_list("diffusion_models") if n.endswith(".safetensors")]
        return io.Schema(
            node_id="MeshLoadDiffusionModel",
            display_name="Mesh Load Diffusion Model",
            category=CATEGORY,
            description="Loads a diffusion model that is larger than this machine's memory: only the blocks that run "
            "here are read, when Mesh Split behind it runs.",
            inputs=[io.Combo.Input("unet_name", options=files, tooltip="A file in models/diffusion_models.")],
            outputs=[io.Model.Output(tooltip="Connect it to Mesh Split, LoRA loaders in between if you like.")],
        )

    @classmethod
    def execute(cls, unet_name: str) -> io.NodeOutput:
        import folder_paths

        from .slim import load

        path = folder_paths.get_full_path_or_raise("diffusion_models", unet_name)
        return io.NodeOutput(load(path, current()))


class MeshRemoteLora(io.ComfyNode):
    """A LoRA that lies on the worker."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MeshRemoteLora",
            display_name="Mesh Remote LoRA",
            category=CATEGORY,
            description="Applies a LoRA from the library of the worker, without a copy on this machine. Stackable. "
            "Blocks that run here need the file here too: then ComfyUI applies it, and the worker uses its own copy.",
            inputs=[
                io.Model.Input("model", tooltip="Before or behind Mesh Split."),
                *_worker_inputs(),
                io.Combo.Input(
                    "lora", options=[NO_LORA], default=NO_LORA, tooltip="LoRAs of that worker; the button asks it anew."
                ),
                io.Float.Input("strength", default=1.0, min=-20.0, max=20.0, step=0.01, tooltip="0 is off."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, worker: str, lora: str) -> bool | str:
        return True

    @classmethod
    def execute(cls, model: Any, worker: str, address: str, lora: str, strength: float) -> io.NodeOutput:
        from .loras import add_remote

        return io.NodeOutput(model if lora == NO_LORA or not strength else add_remote(model, lora, strength))


NODES: list[type[io.ComfyNode]] = [MeshSplit, MeshLoadDiffusionModel, MeshWorkersNode, MeshRemoteLora]
