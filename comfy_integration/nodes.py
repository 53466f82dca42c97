"""The nodes, as ComfyUI's V3 schema describes them. Their texts are in `texts`; what they do is imported late."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from mesh_codec.qualities import EXACT, names, promises

from . import texts
from .node_settings import LORA_POLICIES, OnFailure, SplitSettings
from .pack_state import pack_state
from .workers import WorkerRef, address_of, choices

MeshWorkers = io.Custom("MESH_WORKERS")


def _named(node: str) -> dict[str, str]:
    """What identifies a node and describes it."""
    named = {"node_id": node, "display_name": texts.TITLES[node], "category": texts.CATEGORY}
    return {**named, "description": texts.DESCRIPTIONS[node]}


def _worker_inputs() -> list[Any]:
    options = choices()
    return [
        io.Combo.Input("worker", options=options, default=options[0], tooltip=texts.WORKER),
        io.String.Input("address", default="", tooltip=texts.ADDRESS),
    ]


class MeshSplit(io.ComfyNode):
    """MODEL in, MODEL out: the blocks behind the cut run on a worker."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            **_named("MeshSplit"),
            inputs=[
                io.Model.Input("model", tooltip=texts.SPLIT_MODEL),
                *_worker_inputs(),
                io.Int.Input(
                    "local_blocks",
                    default=-1,
                    min=-1,
                    max=1000,
                    tooltip=texts.SPLIT_LOCAL_BLOCKS,
                ),
                io.Combo.Input(
                    "quality",
                    options=list(names()),
                    default=EXACT,
                    tooltip=f"How the state crosses the network. {promises()}",
                ),
                io.Combo.Input(
                    "loras",
                    options=list(LORA_POLICIES),
                    default="automatic",
                    tooltip=texts.SPLIT_LORAS,
                ),
                io.Combo.Input(
                    "on_failure",
                    options=[choice.value for choice in OnFailure],
                    default=OnFailure.WAIT.value,
                    tooltip=texts.SPLIT_ON_FAILURE,
                ),
                MeshWorkers.Input("workers", optional=True, tooltip=texts.SPLIT_WORKERS),
            ],
            outputs=[io.Model.Output(tooltip=texts.SPLIT_OUTPUT)],
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
        from .cutting import cut_model

        chain = workers or (WorkerRef(address_of(worker, address)),)
        local = None if local_blocks < 0 else local_blocks
        wanted = SplitSettings(chain, local, quality, loras, OnFailure(on_failure))
        return io.NodeOutput(cut_model(model, wanted, pack_state(), str(cls.hidden.unique_id)))


class MeshWorkersNode(io.ComfyNode):
    """A chain of workers, one node each."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            **_named("MeshWorkers"),
            inputs=[
                *_worker_inputs(),
                io.Int.Input(
                    "blocks",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip=texts.WORKERS_BLOCKS,
                ),
                MeshWorkers.Input("before", optional=True, tooltip=texts.WORKERS_BEFORE),
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
            **_named("MeshLoadDiffusionModel"),
            inputs=[io.Combo.Input("unet_name", options=files, tooltip=texts.LOADER_FILE)],
            outputs=[io.Model.Output(tooltip=texts.LOADER_OUTPUT)],
        )

    @classmethod
    def execute(cls, unet_name: str) -> io.NodeOutput:
        import folder_paths

        from .unread_model import load_unread

        path = folder_paths.get_full_path_or_raise("diffusion_models", unet_name)
        return io.NodeOutput(load_unread(path, pack_state()))


class MeshRemoteLora(io.ComfyNode):
    """A LoRA that lies on the worker."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            **_named("MeshRemoteLora"),
            inputs=[
                io.Model.Input("model", tooltip=texts.LORA_MODEL),
                *_worker_inputs(),
                io.Combo.Input("lora", options=[texts.LORA_NONE], default=texts.LORA_NONE, tooltip=texts.LORA_NAME),
                io.Float.Input("strength", default=1.0, min=-20.0, max=20.0, step=0.01, tooltip=texts.LORA_STRENGTH),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, worker: str, lora: str) -> bool | str:
        return True

    @classmethod
    def execute(cls, model: Any, worker: str, address: str, lora: str, strength: float) -> io.NodeOutput:
        from .loras import add_remote

        return io.NodeOutput(model if lora == texts.LORA_NONE or not strength else add_remote(model, lora, strength))


NODES: list[type[io.ComfyNode]] = [MeshSplit, MeshLoadDiffusionModel, MeshWorkersNode, MeshRemoteLora]
