"""Diffusion models cut over several machines: the names that a script uses.

Importing this package loads neither torch nor a transport nor an adapter; each name is loaded when it is first used.
"""

import importlib
import typing

__version__ = "0.1.0"

if typing.TYPE_CHECKING:
    from mesh_core.errors import (
        Cancelled,
        CheckpointChanged,
        CheckpointCorrupt,
        CheckpointError,
        CheckpointMismatch,
        CheckpointUnrecognised,
        ConfigError,
        ConstantsMissing,
        LoraError,
        LoraMissing,
        LoraTooLarge,
        LoraUnmatched,
        MeshError,
        NotAuthorised,
        PeerLost,
        PlanDoesNotFit,
        PlanError,
        PluginBroken,
        PluginConflict,
        PluginError,
        PluginIncompatible,
        PluginNotFound,
        RemoteError,
        SessionError,
        SessionUnknown,
        TransportError,
        TransportTimeout,
        Unreachable,
        UnsupportedInput,
        WireError,
        WireMalformed,
        WireTooLarge,
        WireUnsupportedVersion,
    )
    from mesh_core.hookspecs import hookimpl
    from mesh_core.programs.diffusers import load_pipeline, split, unsplit
    from mesh_core.programs.loras import set_loras

__all__ = [
    "Cancelled",
    "CheckpointChanged",
    "CheckpointCorrupt",
    "CheckpointError",
    "CheckpointMismatch",
    "CheckpointUnrecognised",
    "ConfigError",
    "ConstantsMissing",
    "LoraError",
    "LoraMissing",
    "LoraTooLarge",
    "LoraUnmatched",
    "MeshError",
    "NotAuthorised",
    "PeerLost",
    "PlanDoesNotFit",
    "PlanError",
    "PluginBroken",
    "PluginConflict",
    "PluginError",
    "PluginIncompatible",
    "PluginNotFound",
    "RemoteError",
    "SessionError",
    "SessionUnknown",
    "TransportError",
    "TransportTimeout",
    "Unreachable",
    "UnsupportedInput",
    "WireError",
    "WireMalformed",
    "WireTooLarge",
    "WireUnsupportedVersion",
    "__version__",
    "hookimpl",
    "load_pipeline",
    "set_loras",
    "split",
    "unsplit",
]

_ELSEWHERE = {
    "hookimpl": "mesh_core.hookspecs",
    "load_pipeline": "mesh_core.programs.diffusers",
    "set_loras": "mesh_core.programs.loras",
    "split": "mesh_core.programs.diffusers",
    "unsplit": "mesh_core.programs.diffusers",
}


def __getattr__(name: str) -> typing.Any:
    if name not in __all__:
        raise AttributeError(f"module 'mesh_core' has no attribute {name!r}")
    return getattr(importlib.import_module(_ELSEWHERE.get(name, "mesh_core.errors")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
