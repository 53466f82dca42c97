"""The ComfyUI node pack. ComfyUI imports it when it starts, so it imports next to nothing until a node runs.

Whatever is missing (this package's own distributions, a new enough ComfyUI) becomes a message in the nodes, not a
traceback at start-up.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

WEB_DIRECTORY = str(Path(__file__).parent / "web")

log = logging.getLogger(__name__)


def problem() -> str:
    """Why the nodes cannot work here; empty when they can."""
    try:
        from comfy_api.latest import ComfyExtension, io  # noqa: F401
    except ImportError:
        return "This ComfyUI is too old for ComfyUI-Mesh. Try: update ComfyUI to 0.3.75 or newer."
    try:
        # The codecs themselves: the package alone would not show that what they need is missing.
        import mesh_codec.entropy  # noqa: F401
        import mesh_core  # noqa: F401
    except ImportError as error:
        return (
            f"ComfyUI-Mesh is not installed completely ({error}). Try: run install.py of this folder with ComfyUI's "
            "Python, or: pip install comfyui-mesh comfyui-mesh-flux2 comfyui-mesh-klein."
        )
    return ""


MESSAGE = problem()

if MESSAGE:
    from .unavailable import mappings

    log.error("%s", MESSAGE)
    NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = mappings(MESSAGE)
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
else:
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

    async def comfy_entrypoint() -> Any:
        from .extension import MeshExtension

        return MeshExtension()
