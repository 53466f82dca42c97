"""Models as the core knows them: what a family's adapter says of a checkpoint, and reading it span by span.

These are the names that adapters import; `mesh_core.model.adapting` has more for those of diffusers' model classes.
Each is loaded when it is first used: cutting a model into spans needs no torch.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from mesh_core.model.adapter import ModelAdapter, Stage
    from mesh_core.model.checkpoint import CheckpointHeader, read_header
    from mesh_core.model.shapes import Dimensions
    from mesh_core.model.spans import BlockSpan
    from mesh_core.model.spec import Conditioning, ModelSpec, ParameterSpec, Piece, Role, State
    from mesh_core.model.stored import Claim, Parts, StoredTensor, TensorInfo, WeightFormat
    from mesh_core.model.weights import WeightReader

_HOMES = {
    "BlockSpan": "spans",
    "CheckpointHeader": "checkpoint",
    "Claim": "stored",
    "Conditioning": "spec",
    "Dimensions": "shapes",
    "ModelAdapter": "adapter",
    "ModelSpec": "spec",
    "ParameterSpec": "spec",
    "Parts": "stored",
    "Piece": "spec",
    "Role": "spec",
    "Stage": "adapter",
    "State": "spec",
    "StoredTensor": "stored",
    "TensorInfo": "stored",
    "WeightFormat": "stored",
    "WeightReader": "weights",
    "read_header": "checkpoint",
}

__all__ = [
    "BlockSpan",
    "CheckpointHeader",
    "Claim",
    "Conditioning",
    "Dimensions",
    "ModelAdapter",
    "ModelSpec",
    "ParameterSpec",
    "Parts",
    "Piece",
    "Role",
    "Stage",
    "State",
    "StoredTensor",
    "TensorInfo",
    "WeightFormat",
    "WeightReader",
    "read_header",
]


def __getattr__(name: str) -> typing.Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
